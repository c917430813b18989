"""An exported model as one GGUF file, for llama.cpp and programs built on it.

    python -m dsv3.export gguf outputs/final_model model.gguf --dtype bf16

The file is written tensor by tensor, so at most one layer's experts are in memory. Norms, routers and their biases are
fp32 in every file, as in llama.cpp's own converter: they are small, and the choice of experts depends on them.
"""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from safetensors import safe_open
from torch import Tensor

from dsv3.artifacts import check_replaceable_file, replacing
from dsv3.errors import UserError
from dsv3.export.gguf.metadata import ARCHITECTURE, network_metadata
from dsv3.export.gguf.tensors import gguf_tensors
from dsv3.export.gguf.vocabulary import vocabulary_metadata
from dsv3.export.source import check_source
from dsv3.export.weights import read_model_config

Dtype = Literal["f32", "f16", "bf16"]
TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
"""dtype -> type of the matrices, and of the file as a whole."""

BEGINNING = re.compile(rb"GGUF")


def export_gguf(model: Path, output: Path, dtype: Dtype) -> str:
    """Write the folder `model` to the file `output` with its matrices in `dtype`; return a line that says so.

    Raises `UserError`, before anything is written, for a folder without a model that a GGUF file can express.
    """
    check_source(model)
    config = read_model_config(model)
    check_replaceable_file(output, BEGINNING, "GGUF file")
    metadata: dict[str, Any] = {
        "general.name": model.resolve().name,
        "general.file_type": int(TYPES[dtype][1]),
        **network_metadata(config),
        **vocabulary_metadata(model, config.vocab_size),
    }
    with ExitStack() as stack:
        stored = open_weights(model, stack)

        def shape(key: str) -> Tensor:
            if key not in stored:
                raise UserError(f"{model}: holds no {key}, which its config.json requires; export the model again")
            return torch.empty(stored[key].get_slice(key).get_shape(), device="meta")

        types = [(name, tensor, stored_type(name, tensor, dtype)) for name, tensor in gguf_tensors(config, shape)]
        weights = gguf_tensors(config, lambda key: stored[key].get_tensor(key))
        with replacing(output) as temporary:
            writer = open_writer(temporary, metadata, types)
            for (name, _, tensor_type), (same_name, tensor) in zip(types, weights, strict=True):
                assert name == same_name, (name, same_name)
                writer.write_tensor_data(quantize(tensor.float().contiguous().numpy(), tensor_type))
            writer.close()
    left_out = config.num_nextn_predict_layers
    without = f", without its MTP modules ({left_out})" if left_out else ""
    return f"{output}: {config.num_hidden_layers} layers, matrices in {dtype}{without}"


def open_weights(model: Path, stack: ExitStack) -> dict[str, safe_open]:
    """Return, by name of weight, the open file in the folder `model` that holds it; `stack` closes the files."""
    files = [stack.enter_context(safe_open(path, framework="pt")) for path in sorted(model.glob("*.safetensors"))]
    return {key: file for file in files for key in file.keys()}  # noqa: SIM118 (no mapping)


def stored_type(name: str, tensor: Tensor, dtype: Dtype) -> GGMLQuantizationType:
    """Return the type in which the tensor is stored: `dtype` for matrices, fp32 for vectors and routers."""
    is_kept = tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight")
    return GGMLQuantizationType.F32 if is_kept else TYPES[dtype][0]


def open_writer(
    path: Path, metadata: dict[str, Any], types: list[tuple[str, Tensor, GGMLQuantizationType]]
) -> GGUFWriter:
    """Write everything except the tensors' values; return the writer, which takes these in the order of `types`."""
    writer = GGUFWriter(path, ARCHITECTURE)
    for key, value in metadata.items():
        writer.add_key_value(key, value, value_type(value))
    for name, tensor, tensor_type in types:
        num_bytes = tensor.numel() * GGML_QUANT_SIZES[tensor_type][1]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def value_type(value: Any) -> GGUFValueType:
    """Return the type in which a value of the metadata is stored; llama.cpp reads integers as unsigned."""
    found = GGUFValueType.get_type(value)
    return GGUFValueType.UINT32 if found is GGUFValueType.INT32 else found

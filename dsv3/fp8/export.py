"""Weights in the form that DeepSeek released: e4m3 numbers with one fp32 scale per 128x128 block.

Every quantised `*.weight` is accompanied by `*.weight_scale_inv`, which despite its name is what the stored numbers are
multiplied by, and config.json says so in `quantization_config`. Embedding, output head, routers and norms stay as they
are. So do matrices with a dimension that is no multiple of 128 (`kv_a_proj_with_mqa`): transformers derives the size of
a block from the shapes, and would spread a shorter last block over its neighbours. They are listed in
`modules_to_not_convert`.

    python -m dsv3.export fp8 outputs/final_model outputs/final_model_fp8
"""

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3.artifacts import read_json, replacing_directory, write_json
from dsv3.errors import UserError
from dsv3.fp8.convert import KEPT
from dsv3.fp8.definition import BLOCK
from dsv3.fp8.quantize import quantised_weight

SUFFIX = ".weight"
KEPT_IN_EXPORT = KEPT | {"embed_tokens"}
INDEX = "model.safetensors.index.json"


def export_fp8(model: Path, output: Path) -> None:
    """Write the folder `model` to `output` with its matrices in FP8; every other file is copied."""
    if not (model / "config.json").is_file():
        raise UserError(f"{model} holds no config.json; name a folder that save_pretrained wrote")
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise UserError(f"{model} holds no *.safetensors; name a folder that save_pretrained wrote")
    with replacing_directory(output) as folder:
        ignored = shutil.ignore_patterns("*.safetensors", INDEX)
        shutil.copytree(model, folder, ignore=ignored, dirs_exist_ok=True)
        kept: list[str] = []
        weight_map: dict[str, str] = {}
        total_bytes = 0
        for file in files:
            tensors, kept_here = quantised_tensors(file)
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
            kept += kept_here
            weight_map |= dict.fromkeys(tensors, file.name)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if len(files) > 1:
            write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
        config = read_json(model / "config.json") | {"quantization_config": quantization_config(kept)}
        write_json(folder / "config.json", config)


def quantised_tensors(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a safetensors file with its matrices in FP8, and the modules that were left alone."""
    tensors: dict[str, Tensor] = {}
    kept: list[str] = []
    with safe_open(file, framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118 (no mapping)
            tensor = stored.get_tensor(key)
            if not is_matrix(key, tensor):
                tensors[key] = tensor
            elif tensor.shape[0] % BLOCK or tensor.shape[1] % BLOCK:
                tensors[key] = tensor
                kept.append(key.removesuffix(SUFFIX))
            else:
                quantised = quantised_weight(tensor)
                tensors[key], tensors[f"{key}_scale_inv"] = quantised.values, quantised.scales
    return tensors, kept


def is_matrix(key: str, tensor: Tensor) -> bool:
    """Return whether the tensor is the weight of a layer that DeepSeek stores in FP8."""
    return key.endswith(SUFFIX) and tensor.dim() == 2 and not KEPT_IN_EXPORT.intersection(key.split("."))


def quantization_config(kept: list[str]) -> dict[str, object]:
    """Return the entry of config.json, as DeepSeek writes it, with the modules that stayed in high precision."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", *kept],
    }

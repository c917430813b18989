"""Weights in the form that DeepSeek released: e4m3 numbers with one fp32 scale per 128x128 block.

Every quantized `*.weight` has a `*.weight_scale_inv`, which despite its name is what the stored numbers are multiplied
by, and config.json has a `quantization_config`. Scales are any fp32 number, as in V3, or powers of two, as in V3.1,
whose config.json says `scale_fmt: ue8m0`: there, too, they are stored as fp32, and activations get such scales as well.
A training with `train.fp8_power_of_two_scales` multiplied by the latter. The index of the weights is there even for
one file, since DeepSeek's conversion to bf16 opens it first.

Embedding, output head, routers, norms and `eh_proj` are not quantized.
Neither are matrices with a dimension that is no multiple of 128 (`kv_a_proj_with_mqa`): transformers derives the block
size from the shapes, and would apply the scale of a shorter last block to other blocks' numbers. Nor are matrices that
vLLM and SGLang fuse with such a matrix (`q_a_proj`): they refuse a fused product that is half FP8.

`modules_to_not_convert` lists the matrices that are not quantized, and the fused products they are part of, under the
names that each server looks for.

    python -m dsv3.export fp8 outputs/final_model outputs/final_model_fp8 [--power-of-two-scales]
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3.artifacts import read_json, replacing_directory, write_json
from dsv3.errors import UserError
from dsv3.export.source import check_source
from dsv3.export.weights import INDEX, SUMS, write_sums
from dsv3.fp8.definition import BLOCK
from dsv3.fp8.quantize import quantized_weight
from dsv3.kernels.convert import HIGH_PRECISION

SUFFIX = ".weight"
KEPT_IN_EXPORT = HIGH_PRECISION | {"embed_tokens", "eh_proj"}
"""Parts of module names. `eh_proj` is a plain linear layer in vLLM and SGLang, which read no scales for it."""
FUSED = {
    ("q_a_proj", "kv_a_proj_with_mqa"): ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"): ("gate_up_proj",),
}
"""Matrices that servers multiply as one -> the names of the fused product, in vLLM and in SGLang."""


def export_fp8(model: Path, output: Path, power_of_two_scales: bool = False) -> None:
    """Write the folder `model` to `output` with its matrices in FP8; every other file is copied.

    Raises `UserError`, before anything is written, for an `output` that exists and is not empty, and for a model that
    is quantized or damaged.
    """
    check_source(model)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"{output}: is there already; remove it, or name a new folder")
    files = sorted(model.glob("*.safetensors"))
    config = read_json(model / "config.json")
    kept = unquantized_modules(matrix_shapes(files)) + unquantized_projections(config)
    with replacing_directory(output) as folder:
        ignored = shutil.ignore_patterns("*.safetensors", INDEX, SUMS)
        shutil.copytree(model, folder, ignore=ignored, dirs_exist_ok=True)
        weight_map: dict[str, str] = {}
        total_bytes = 0
        for file in files:
            tensors = quantized_tensors(file, kept, power_of_two_scales)
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file.name)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
        quantization = quantization_config(
            modules_to_not_convert(kept, config["num_hidden_layers"]), power_of_two_scales
        )
        write_json(folder / "config.json", {**config, "quantization_config": quantization})
        write_sums(folder)


def matrix_shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    """Return module -> shape of every weight that DeepSeek stores in FP8, without reading the weights."""
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (no mapping)
                shape = stored.get_slice(key).get_shape()
                if is_matrix(key, len(shape)):
                    shapes[key.removesuffix(SUFFIX)] = shape
    return shapes


def unquantized_modules(shapes: dict[str, list[int]]) -> list[str]:
    """Return the modules that are not quantized: those with an incomplete block, and those fused with them."""
    kept = {module for module, shape in shapes.items() if any(size % BLOCK for size in shape)}
    for module in list(kept):
        parent, _, name = module.rpartition(".")
        partners = [f"{parent}.{partner}" for pair in FUSED if name in pair for partner in pair]
        kept.update(partner for partner in partners if partner in shapes)
    return sorted(kept)


def unquantized_projections(config: dict[str, Any]) -> list[str]:
    """Return the MTP modules' projections, which are stored as they are: a loader would else take them for FP8."""
    first = config["num_hidden_layers"]
    return [f"model.layers.{first + depth}.eh_proj" for depth in range(config.get("num_nextn_predict_layers") or 0)]


def modules_to_not_convert(kept: list[str], num_hidden_layers: int) -> list[str]:
    """Return `kept` with the names of fused products; the experts of a layer are replaced by one name for all of them.

    SGLang calls the first MTP module `model.decoder`, so its modules are listed under that name too.
    """
    names: dict[str, None] = {}
    for module in kept:
        parent, _, name = module.rpartition(".")
        if ".experts." in parent:
            names[parent.rpartition(".")[0]] = None
            continue
        names[module] = None
        for pair, products in FUSED.items():
            if name in pair and all(f"{parent}.{partner}" in kept for partner in pair):
                names |= dict.fromkeys(f"{parent}.{product}" for product in products)
    mtp_module = f"model.layers.{num_hidden_layers}."
    sglang_names = [name.replace(mtp_module, "model.decoder.") for name in names if name.startswith(mtp_module)]
    return [*names, *sglang_names]


def quantized_tensors(file: Path, kept: list[str], power_of_two_scales: bool) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file with its matrices in FP8, except for the modules in `kept`."""
    tensors: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118 (no mapping)
            tensor = stored.get_tensor(key)
            if not is_matrix(key, tensor.dim()) or key.removesuffix(SUFFIX) in kept:
                tensors[key] = tensor
            else:
                quantized = quantized_weight(tensor, power_of_two_scales)
                tensors[key], tensors[f"{key}_scale_inv"] = quantized.values, quantized.scales
    return tensors


def is_matrix(key: str, num_dims: int) -> bool:
    """Return whether a tensor is the weight of a layer that DeepSeek stores in FP8."""
    return key.endswith(SUFFIX) and num_dims == 2 and not KEPT_IN_EXPORT.intersection(key.split("."))


def quantization_config(kept: list[str], power_of_two_scales: bool) -> dict[str, Any]:
    """Return config.json's `quantization_config`, as DeepSeek writes it, with the modules that are not quantized."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        **({"scale_fmt": "ue8m0"} if power_of_two_scales else {}),
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", *kept],
    }

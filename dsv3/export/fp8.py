"""Weights in the form that DeepSeek released: e4m3 numbers with one fp32 scale per 128x128 block.

Every quantised `*.weight` is accompanied by `*.weight_scale_inv`, which despite its name is what the stored numbers are
multiplied by, and config.json says so in `quantization_config`. Embedding, output head, routers, norms and `eh_proj`
stay as they are. So do matrices with a dimension that is no multiple of 128 (`kv_a_proj_with_mqa`): transformers
derives the size of a block from the shapes, and would spread a shorter last block over its neighbours. And so does what
vLLM and SGLang multiply together with such a matrix (`q_a_proj`), since they refuse a product of which a part is FP8.

`modules_to_not_convert` lists the matrices that stayed, and the products they are part of, by the names under which
each reader looks for them.

    python -m dsv3.export fp8 outputs/final_model outputs/final_model_fp8
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3.artifacts import check_weights, read_json, replacing_directory, write_json
from dsv3.errors import UserError
from dsv3.fp8.definition import BLOCK
from dsv3.fp8.quantize import quantized_weight
from dsv3.kernels.convert import HIGH_PRECISION

SUFFIX = ".weight"
KEPT_IN_EXPORT = HIGH_PRECISION | {"embed_tokens", "eh_proj"}
"""Parts of names; that of `eh_proj` is a plain linear layer in vLLM and SGLang, which know no scales for it."""
JOINED = {
    ("q_a_proj", "kv_a_proj_with_mqa"): ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"): ("gate_up_proj",),
}
"""Matrices that servers multiply as one -> the product's names, in vLLM and in SGLang."""
INDEX = "model.safetensors.index.json"


def export_fp8(model: Path, output: Path) -> None:
    """Write the folder `model` to `output` with its matrices in FP8; every other file is copied.

    Raises `UserError`, before anything is written, for an `output` that is there and not empty, and for a model that is
    quantised or damaged.
    """
    if not (model / "config.json").is_file():
        raise UserError(f"{model} holds no config.json; name a folder that save_pretrained wrote")
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise UserError(f"{model} holds no *.safetensors; name a folder that save_pretrained wrote")
    if "quantization_config" in read_json(model / "config.json"):
        raise UserError(f"{model}: is quantised already; name the folder that was quantised, in full precision")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):  # whose files would they be?
        raise UserError(f"{output}: is there already; remove it, or name a new folder")
    check_weights(model)
    kept = kept_modules(shapes_of_matrices(files))
    with replacing_directory(output) as folder:
        ignored = shutil.ignore_patterns("*.safetensors", INDEX)
        shutil.copytree(model, folder, ignore=ignored, dirs_exist_ok=True)
        weight_map: dict[str, str] = {}
        total_bytes = 0
        for file in files:
            tensors = quantised_tensors(file, kept)
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file.name)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if len(files) > 1:
            write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
        config = read_json(model / "config.json")
        quantization = quantization_config(server_names(kept, config["num_hidden_layers"]))
        write_json(folder / "config.json", {**config, "quantization_config": quantization})


def shapes_of_matrices(files: Iterable[Path]) -> dict[str, list[int]]:
    """Return module -> shape of every weight that DeepSeek stores in FP8, without reading a number."""
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (no mapping)
                shape = stored.get_slice(key).get_shape()
                if is_matrix(key, len(shape)):
                    shapes[key.removesuffix(SUFFIX)] = shape
    return shapes


def kept_modules(shapes: dict[str, list[int]]) -> list[str]:
    """Return the modules that stay in high precision: those with an incomplete block, and their partners."""
    kept = {module for module, shape in shapes.items() if any(size % BLOCK for size in shape)}
    for module in list(kept):
        parent, _, name = module.rpartition(".")
        partners = [f"{parent}.{partner}" for pair in JOINED if name in pair for partner in pair]
        kept.update(partner for partner in partners if partner in shapes)
    return sorted(kept)


def server_names(kept: list[str], num_hidden_layers: int) -> list[str]:
    """Return `kept` with the names of the products: of pairs, and of the experts of a layer, which stand for them all.

    SGLang calls the first prediction module `model.decoder`, and looks for the names in it accordingly.
    """
    names: dict[str, None] = {}
    for module in kept:
        parent, _, name = module.rpartition(".")
        if ".experts." in parent:
            names[parent.rpartition(".")[0]] = None
            continue
        names[module] = None
        for pair, products in JOINED.items():
            if name in pair and all(f"{parent}.{partner}" in kept for partner in pair):
                names |= dict.fromkeys(f"{parent}.{product}" for product in products)
    prediction = f"model.layers.{num_hidden_layers}."
    drafting = [name.replace(prediction, "model.decoder.") for name in names if name.startswith(prediction)]
    return [*names, *drafting]


def quantised_tensors(file: Path, kept: list[str]) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file with its matrices in FP8, except for the modules in `kept`."""
    tensors: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118 (no mapping)
            tensor = stored.get_tensor(key)
            if not is_matrix(key, tensor.dim()) or key.removesuffix(SUFFIX) in kept:
                tensors[key] = tensor
            else:
                quantised = quantized_weight(tensor)
                tensors[key], tensors[f"{key}_scale_inv"] = quantised.values, quantised.scales
    return tensors


def is_matrix(key: str, num_dims: int) -> bool:
    """Return whether a tensor is the weight of a layer that DeepSeek stores in FP8."""
    return key.endswith(SUFFIX) and num_dims == 2 and not KEPT_IN_EXPORT.intersection(key.split("."))


def quantization_config(kept: list[str]) -> dict[str, Any]:
    """Return the entry of config.json, as DeepSeek writes it, with the modules that stayed in high precision."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", *kept],
    }

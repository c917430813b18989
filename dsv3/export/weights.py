"""Whether the files in a model's folder are the model that its config.json describes; read in pieces, nothing is run.

A model is built without memory for its weights, and the names and shapes that it would be stored under are compared
with those in the headers of the files. So a tensor that is missing, left over or of another shape is found before
anything is loaded, where transformers would fill it with random numbers or leave it out. Then every number must be
finite, and every file as `SHA256SUMS` says, where the folder has one (`sha256sum --check SHA256SUMS` asks the same).
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, get_origin

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion

from dsv3.artifacts import REMEDY, check_weights, read_json, read_model, read_regular, sha256_file
from dsv3.errors import UserError, one_line
from dsv3.params.section import error_line
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from mini_model.validation_deepseek import check_model_type

SUMS = "SHA256SUMS"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UNSUMMED = ("README.md", "__pycache__", SUMS)
"""What may change after the export: the words of the card, and what Python leaves beside code that was run."""
DTYPES = {"F32", "F16", "BF16"}
QUANTIZED_DTYPES = DTYPES | {"F8_E4M3"}
SCALE = "_scale_inv"


FIELDS: dict[str, Any] = {
    name: (hint, None)
    for name, hint in DeepseekV3Config.__annotations__.items()
    if get_origin(hint) is not ClassVar and hint is not ClassVar
}
STATED: type[BaseModel] = create_model("Stated", __config__=ConfigDict(strict=True), **FIELDS)
"""The types of the configuration's own fields, which its class does not check."""


class Index(BaseModel):
    """Which file holds which tensor."""

    weight_map: dict[str, str]


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of every file in `folder` to its `SHA256SUMS`."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in UNSUMMED)
    lines = [f"{sha256_file(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def check_sums(folder: Path) -> None:
    """Raise `UserError` where a file is not as `SHA256SUMS` says; a folder without one is not checked."""
    sums = folder / SUMS
    if not os.path.lexists(sums):
        return
    remedy = f"{REMEDY}; remove {SUMS} if the change is yours"
    try:
        text = read_regular(sums)
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in text.splitlines())}
    except (ValueError, OSError):
        raise UserError(f"{sums}: damaged; {remedy}") from None
    if not text.endswith("\n") or any(Path(name).name != name for name in expected):
        raise UserError(f"{sums}: damaged; {remedy}")
    for name, digest in expected.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing, though {SUMS} names it; {remedy}")
        if sha256_file(folder / name) != digest:
            raise UserError(f"{folder / name}: is not the file that was exported ({SUMS}); {remedy}")


def read_model_config(folder: Path) -> DeepseekV3Config:
    """Return the configuration in `folder`; `UserError` where it is no DeepSeek-V3 that this project implements."""
    path = folder / "config.json"
    check_config_model_type(path)
    values = read_json(path)
    try:
        STATED.model_validate({name: value for name, value in values.items() if name in STATED.model_fields})
        return DeepseekV3Config.from_dict(values)
    except ValidationError as error:
        raise UserError(f"{path}: {error_line(error.errors()[0])}; {REMEDY}") from None
    except Exception as error:  # transformers raises types of its own for each kind of wrong value
        raise UserError(f"{path}: {short_line(error)}; {REMEDY}") from None


def check_config_model_type(config: Path) -> None:
    """Raise `UserError` where config.json is another architecture's."""
    values = read_json(config)
    try:
        check_model_type(values.get("model_type") if isinstance(values, dict) else None)
    except ValueError as error:
        raise UserError(f"{config}: {error}; name another folder") from None


def check_model_weights(folder: Path, config: DeepseekV3Config) -> None:
    """Raise `UserError` unless `folder` holds exactly the weights of `config`, all finite, as they were exported."""
    check_weights(folder)
    files = weight_files(folder)
    is_quantized = getattr(config, "quantization_config", None) is not None
    stored = dict(stored_shapes(files, QUANTIZED_DTYPES if is_quantized else DTYPES))
    if is_quantized:
        stored = {name: shape for name, shape in stored.items() if not name.endswith(SCALE)}
    check_names(folder, config, stored, expected_shapes(folder, config, len(stored)))
    for file in files:
        name = non_finite_weight(file)
        if name:
            raise UserError(f"{file}: {name} holds a number that is not finite; {REMEDY}")
    if config.tie_word_embeddings and "lm_head.weight" in stored:
        check_tied(folder, files)
    check_sums(folder)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights; `UserError` unless they are those of the index, or the only one."""
    index, found = folder / INDEX, {path.name for path in folder.glob("*.safetensors")}
    weight_map = read_model(index, Index, REMEDY).weight_map if index.is_file() else None
    names = {SINGLE} if weight_map is None else set(weight_map.values())
    if names != found:
        odd = sorted(names ^ found)[0]
        how = "missing" if odd in names else f"no part of the model; must be named by {INDEX}"
        raise UserError(f"{folder / odd}: {how}; {REMEDY}")
    files = [folder / name for name in sorted(names)]
    if weight_map is not None:
        held = {name: file.name for file in files for name, _, _ in headers(file)}
        if held != weight_map:
            raise UserError(f"{index}: names other tensors than the files hold; {REMEDY}")
    return files


def headers(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape and dtype of every tensor in a file."""
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 (no mapping)
            part = stored.get_slice(name)
            yield name, tuple(part.get_shape()), part.get_dtype()


def stored_shapes(files: Iterable[Path], dtypes: set[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor; `UserError` for a dtype that weights don't have."""
    for file in files:
        for name, shape, dtype in headers(file):
            if dtype not in dtypes:
                raise UserError(f"{file}: {name} is {dtype}; must be one of {', '.join(sorted(dtypes))}; {REMEDY}")
            yield name, shape


def expected_shapes(folder: Path, config: DeepseekV3Config, num_stored: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a model of `config` is stored as, by name."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    if max(layers, config.n_routed_experts) > num_stored:  # before a nonsensical number of them is built
        raise UserError(f"{folder}: holds {num_stored} tensors, too few for the layers of its config.json; {REMEDY}")
    try:
        with torch.device("meta"):
            model = DeepseekV3ForCausalLM(config)
        state = revert_weight_conversion(model, model.state_dict())
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder / 'config.json'}: no model can be built from it ({short_line(error)}); {REMEDY}"
        ) from None
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_names(
    folder: Path, config: DeepseekV3Config, stored: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    """Raise `UserError` where names or shapes differ.

    Copies of the embedding may be there or not: a tied head, and embedding and head of an MTP module of `config`.
    """
    copies = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for index in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        copies |= {f"model.layers.{index}.{part}.weight" for part in ("embed_tokens", "shared_head.head")}
    allowed = expected | dict.fromkeys(copies, expected["model.embed_tokens.weight"])
    faults = {
        "missing": sorted(expected.keys() - copies - stored.keys()),
        "not of this model": sorted(stored.keys() - allowed.keys()),
        "of another shape": sorted(name for name in stored if name in allowed and stored[name] != allowed[name]),
    }
    for what, names in faults.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{folder}: weights and config.json do not match: {names[0]}{more} {what}; {REMEDY}")


def check_tied(folder: Path, files: Iterable[Path]) -> None:
    """Raise `UserError` where a tied head is stored with other numbers than the embedding."""
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            names = {"lm_head.weight", "model.embed_tokens.weight"} & set(stored.keys())
            found |= {name: stored.get_tensor(name) for name in names}
    if not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"]):
        raise UserError(
            f"{folder / 'config.json'}: tie_word_embeddings is true, but head and embedding differ; {REMEDY}"
        )


def non_finite_weight(file: Path) -> str:
    """Return the name of a tensor in `file` with a number that is not finite, or an empty text; reads one at a time."""
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 (no mapping)
            tensor = stored.get_tensor(name)
            tensor = tensor.float() if tensor.element_size() == 1 else tensor
            if not tensor.isfinite().all():
                return name
    return ""


def short_line(error: BaseException) -> str:
    """Return an error's message as one short line."""
    return one_line(error)[:200]

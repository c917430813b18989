"""Where vLLM and SGLang put the tensors of a folder, read in the files that tests/server_parameters.py names."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from tests.server_parameters import VLLM_MTP, Config, Places, Server, Stored, created


def fits(server: Server, folder: Path) -> tuple[Places, Places]:
    """Return what the folder fills and what the server created: equal, or the server misses or refuses something."""
    config = json.loads((folder / "config.json").read_text())
    return filled(server, config, stored(folder)), created(server, config)


def stored(folder: Path) -> dict[str, Stored]:
    """Return type and shape of every tensor in a folder's safetensors."""
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            found |= {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    return found


def filled(server: Server, config: Config, tensors: Mapping[str, Stored]) -> Places:
    """Return what the keys of a folder fill; raise `ValueError` where two of them fill the same place."""
    places: Places = {}
    for key, tensor in tensors.items():
        name = renamed(server, config, key)
        if name is None:
            continue
        place = part_of(server, config, name)
        if place in places:
            raise ValueError(f"{key} fills {place}, which is filled")
        places[place] = tensor
    return places


def renamed(server: Server, config: Config, key: str) -> str | None:
    """Return a key's name in the server's class, or None if the class skips it."""
    first, match = config["num_hidden_layers"], re.match(r"model\.layers\.(\d+)\.(.*)", key)
    layer = int(match[1]) if match else -1
    depth = config["num_nextn_predict_layers"]
    if not match or not first <= layer < first + depth:
        return None if server.drafts else key
    if not server.drafts:
        return None
    name = match[2]
    is_mtp_weight = re.match(r"enorm|hnorm|eh_proj|shared_head\.", name)
    if server is VLLM_MTP:
        if name.startswith("embed_tokens"):
            return f"model.{name}" if layer == first else None
        return key if is_mtp_weight else f"model.layers.{layer}.mtp_block.{name}"
    if layer > first or name.startswith(("embed_tokens", "shared_head.head")):
        return None
    return f"model.{name}" if is_mtp_weight else f"model.decoder.{name}"


def part_of(server: Server, config: Config, name: str) -> tuple[str, str]:
    """Return the parameter that a tensor belongs to, and its part there."""
    if match := re.fullmatch(r"(.*\.mlp\.experts)\.(\d+\.(gate|up|down)_proj)\.(weight.*)", name):
        return f"{match[1]}.{'w2' if match[3] == 'down' else 'w13'}_{match[4]}", match[2]
    if match := re.fullmatch(r"(.*\.)(gate_proj|up_proj)\.(.*)", name):
        return f"{match[1]}gate_up_proj.{match[3]}", match[2]
    match = re.fullmatch(r"(.*\.)(q_a_proj|kv_a_proj_with_mqa)\.(.*)", name)
    if match and config["q_lora_rank"] is not None:
        return f"{match[1]}{server.latents}.{match[3]}", match[2]
    return name, ""

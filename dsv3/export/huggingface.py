"""A trained model as a folder in Hugging Face's format."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from dsv3.artifacts import read_json, replacing_directory, write_json
from dsv3.data.tokenizer import CONFIG_FILE, WRITTEN_FILES, read_tokenizer
from dsv3.export.model_card import loaders
from dsv3.export.model_folder import CODE_FILES, model_folder_contents
from dsv3.export.weights import write_sums
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM


def export_huggingface(
    model: DeepseekV3ForCausalLM, state: Mapping[str, torch.Tensor], tokens: Path, output: Path, card: str
) -> None:
    """Replace `output` by a folder with the weights of `state`, configuration, tokenizer, code and model card.

    The folder loads with `AutoModelForCausalLM.from_pretrained` alone, by transformers' own DeepseekV3, and with
    `trust_remote_code=True` by the Python files in it; with another router than DeepSeek-V3's, by the latter
    only. Tokenizer and special tokens come from the token data.
    """
    meta = read_json(tokens / "meta.json")
    special = {"bos_token_id": meta["bos_token_id"], "eos_token_id": meta["eos_token_id"]}
    for name, token_id in special.items():
        setattr(model.config, name, token_id)
    pad_token, pad_token_id = padding_token(tokens / "tokenizer", meta["eos_token_id"])
    model.generation_config = GenerationConfig(**special, pad_token_id=pad_token_id)
    with replacing_directory(output, model_folder_contents(tokens)) as folder:
        model.save_pretrained(folder, state_dict=add_tied_head(model.config, state))
        config = folder / "config.json"
        write_json(config, {**read_json(config), **transformers_4_rope_fields(model.config)})
        for source in filter(Path.is_file, (tokens / "tokenizer" / name for name in WRITTEN_FILES)):
            shutil.copy(source, folder)
        add_missing_fields(folder / CONFIG_FILE, {"pad_token": pad_token, "padding_side": "left"})
        (folder / "README.md").write_text(card + loaders(model.config), encoding="utf-8", newline="\n")
        missing = [name for name in CODE_FILES if not (folder / name).is_file()]
        assert not missing, f"save_pretrained left out {missing}"
        write_sums(folder)


def padding_token(directory: Path, eos_token_id: int) -> tuple[str, int]:
    """Return the padding token that the tokenizer in `directory` names, and its id; eos where it names none."""
    tokenizer = read_tokenizer(directory)
    stated = read_json(directory / CONFIG_FILE).get("pad_token")
    token = stated["content"] if isinstance(stated, dict) else stated
    token_id = tokenizer.token_to_id(token) if token else None
    return (str(tokenizer.id_to_token(eos_token_id)), eos_token_id) if token_id is None else (str(token), token_id)


def add_missing_fields(path: Path, fields: dict[str, Any]) -> None:
    """Add `fields` to the JSON object at `path`, without those it has.

    A batch of prompts can then be tokenized with `padding=True`. It is padded on the left, where generation continues.
    """
    stated = {name: value for name, value in read_json(path).items() if value is not None}
    write_json(path, {**fields, **stated})


def add_tied_head(config: DeepseekV3Config, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `state` with a copy of the embedding as output head, if the two are tied.

    vLLM and SGLang create a separate head for this architecture and load it from the file, tied or not. transformers
    loads both and ties them again.
    """
    tied = {"lm_head.weight": state["model.embed_tokens.weight"].clone()} if config.tie_word_embeddings else {}
    return {**state, **tied}


def transformers_4_rope_fields(config: DeepseekV3Config) -> dict[str, Any]:
    """Return `rope_parameters` under the older names, which DeepSeek's own config.json has.

    Programs on transformers 4 read only these, and would silently use a base of 10,000 without them.
    """
    rope = dict(config.rope_parameters or {})
    theta = rope.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if rope["rope_type"] == "default" else rope}

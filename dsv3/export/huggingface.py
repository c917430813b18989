"""From a trained model to the folder that is published."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from dsv3.artifacts import read_json, replacing_directory, write_json
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM

CODE_FILES = ("configuration_deepseek.py", "modeling_deepseek.py", "validation_deepseek.py")


def export(
    model: DeepseekV3ForCausalLM, state: Mapping[str, torch.Tensor], tokens: Path, output: Path, card: str
) -> None:
    """Write `output` whole, in place of what was there: weights of `state`, configuration, tokenizer, code and card.

    The folder loads with `AutoModelForCausalLM.from_pretrained` alone, by transformers' own DeepseekV3, and with
    `trust_remote_code=True` by the Python files in it. Tokenizer and special tokens come from the token data.
    """
    meta = read_json(tokens / "meta.json")
    special = {"bos_token_id": meta["bos_token_id"], "eos_token_id": meta["eos_token_id"]}
    for name, token_id in special.items():
        setattr(model.config, name, token_id)
    model.generation_config = GenerationConfig(**special, pad_token_id=special["eos_token_id"])
    with replacing_directory(output) as folder:
        model.save_pretrained(folder, state_dict=with_own_head(model.config, state))
        config = folder / "config.json"
        write_json(config, {**read_json(config), **rope_of_transformers_4(model.config)})
        shutil.copytree(tokens / "tokenizer", folder, dirs_exist_ok=True)
        (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
        missing = [name for name in CODE_FILES if not (folder / name).is_file()]
        assert not missing, f"save_pretrained left out {missing}"


def with_own_head(config: DeepseekV3Config, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `state` with a copy of the embedding as output head where both are one tensor.

    vLLM and SGLang build a head of its own for this architecture and fill it from the file, whether it is tied or not;
    transformers reads both and ties them again.
    """
    tied = {"lm_head.weight": state["model.embed_tokens.weight"].clone()} if config.tie_word_embeddings else {}
    return {**state, **tied}


def rope_of_transformers_4(config: DeepseekV3Config) -> dict[str, Any]:
    """Return what `rope_parameters` says under its older names, which DeepSeek's own config.json has.

    Programs on transformers 4 read nothing else, and would rotate by a base of 10,000 without a word.
    """
    rope = dict(config.rope_parameters or {})
    theta = rope.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if rope["rope_type"] == "default" else rope}

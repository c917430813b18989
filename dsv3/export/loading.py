"""Loading the exported model by transformers, with the code in its own folder, as any other program would."""

from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import HF_MODULES_CACHE

from dsv3.artifacts import check_weights, read_json
from dsv3.errors import UserError
from dsv3.export.source import check_config_model_type

LOCK_S = 120
"""Longest wait for another process that loads a model."""


def check_model(folder: Path) -> None:
    """Raise `UserError` unless `folder` holds an exported model with its own code."""
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder}: holds no config.json; run dvc repro train")
    check_config_model_type(config)
    if "AutoModelForCausalLM" not in read_json(config).get("auto_map", {}):
        raise UserError(f"{config}: names no code of its own (auto_map); export it with stages.train")


def load_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """Return the model in `folder` on `device`, in evaluation mode.

    The weights have their stored dtype on a GPU, and fp32 on a CPU, because most CPUs are fast in fp32 only.
    """
    check_model(folder)
    check_weights(folder)
    dtype = torch.float32 if device.type == "cpu" else "auto"
    cache = Path(HF_MODULES_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    # transformers copies the code into this shared folder without a lock; another process could import half of it.
    with FileLock(cache / "dsv3.lock", timeout=LOCK_S):
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=dtype, device_map={"": device}
        )
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that was exported with the model in `folder`."""
    check_model(folder)
    return AutoTokenizer.from_pretrained(folder)

"""Checkpoints: what a killed training goes on from.

They are insurance against a crash, not artefacts, so DVC does not know them: it deletes a stage's outputs before the
stage runs, and checks them out by force in `dvc exp run`. They lie at the root of the repository, where temporary and
queued experiments find them too, in a folder named by the fingerprint of everything that shapes the weights
(`dsv3.training.fingerprint`), which one training at a time may use (`dsv3.training.lock`):

    .checkpoints/<fingerprint>/facts.json
                               step_200/{model.safetensors, optimizer.pt, scheduler.pt, config.json, trainer_state.json,
                                         complete}
                               best_150/{model.safetensors, complete}

The same fingerprint resumes; any other starts afresh. A folder is written under a temporary name, flushed, marked
complete and renamed; only then are older ones removed. After the export all of it is deleted, or a repeated training
would find itself finished.

No state of data or random numbers is saved: both are functions of the seed and the step.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from dsv3.artifacts import read_json, replacing_directory
from dsv3.errors import UserError

FORMAT_VERSION = 1
"""Of what is written here; part of the fingerprint."""

COMPLETE = "complete"
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "first_k_dense_replace", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_nextn_predict_layers",
    "tie_word_embeddings",
)  # fmt: skip
"""What decides the shapes of the weights."""


def checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in `directory`, oldest first."""
    found = [path for path in directory.glob("step_*") if (path / COMPLETE).is_file()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    state: dict[str, Any],
) -> None:
    """Write `directory`/step_N, N being `state["step"]`; `state` is what the loop needs to go on, as JSON."""
    with replacing_directory(directory / f"step_{state['step']}") as folder:
        save_model(model, str(folder / "model.safetensors"))
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        # The schedule is a function of the step; this file is for those who look for Hugging Face's layout.
        torch.save({"last_epoch": state["step"]}, folder / "scheduler.pt")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
        (folder / COMPLETE).write_text(f"{state['step']}\n", encoding="utf-8")


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the weights and the optimizer's state from `folder` in place; return the loop's state."""
    load_model(model, folder / "model.safetensors")
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
    return read_json(folder / "trainer_state.json")


def check_checkpoint(folder: Path, config: Mapping[str, Any], total_steps: int) -> None:
    """Raise `UserError` unless `folder` is a complete checkpoint of this architecture that leaves steps to be done."""
    where = f"train.resume_from_checkpoint is {folder}"
    if not (folder / COMPLETE).is_file():
        raise UserError(f"{where}; holds no complete checkpoint; name a folder step_N under .checkpoints/")
    saved = read_json(folder / "config.json")
    changed = [name for name in SIZES if saved.get(name) != config.get(name)]
    if changed:
        values = ", ".join(f"{name} {saved.get(name)} instead of {config.get(name)}" for name in changed)
        raise UserError(f"{where}; of another architecture ({values}); set model.config to its file")
    step = read_json(folder / "trainer_state.json")["step"]
    if step >= total_steps:
        raise UserError(f"{where}; must be before step {total_steps}, the last; raise train.num_train_epochs")


def save_best(directory: Path, model: nn.Module, step: int) -> None:
    """Write the weights alone to `directory`/best_N; older ones stay until a checkpoint is saved."""
    with replacing_directory(best_folder(directory, step)) as folder:
        save_model(model, str(folder / "model.safetensors"))
        (folder / COMPLETE).write_text(f"{step}\n", encoding="utf-8")


def load_best(directory: Path, model: nn.Module, step: int) -> None:
    """Load the weights that `save_best` wrote for `step`, in place."""
    load_model(model, best_folder(directory, step) / "model.safetensors")


def best_folder(directory: Path, step: int) -> Path:
    """Return the folder of the best weights."""
    return directory / f"best_{step}"


def prune(directory: Path, save_total_limit: int, best_step: int) -> None:
    """Remove all but the newest `save_total_limit` checkpoints, other best weights, and what was left half-written.

    Best weights newer than the newest checkpoint stay: this is called when there are none.
    """
    for old in checkpoints(directory)[:-save_total_limit]:
        shutil.rmtree(old)
    for path in directory.iterdir():
        is_old_best = path.name.startswith("best_") and path != best_folder(directory, best_step)
        is_unfinished = path.is_dir() and not (path / COMPLETE).is_file()
        if is_old_best or is_unfinished:
            shutil.rmtree(path)


def delete_checkpoints(directory: Path) -> None:
    """Remove all that was saved in `directory`, whole or half-written."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)

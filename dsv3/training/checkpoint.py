"""Checkpoints: what a killed training goes on from.

They are insurance against a crash, not artefacts, so DVC does not know them: it deletes a stage's outputs before the
stage runs, and checks them out by force in `dvc exp run`. They lie at the root of the repository, where temporary and
queued experiments find them too, in a folder named by the fingerprint of everything that shapes the weights
(`dsv3.training.fingerprint`), which one training at a time may use (`dsv3.training.lock`):

    .checkpoints/<fingerprint>/facts.json
                               step_200/{model.safetensors, optimizer.pt, scheduler.pt, config.json, trainer_state.json,
                                         complete}
                               best_150/{model.safetensors, complete}
                               damaged_step_250/

A sharded training writes, in the place of model.safetensors and optimizer.pt, torch's distributed checkpoint: a file
from each process (`__0_0.distcp`) and `.metadata`, which says what is where. Either kind is read by any number of
processes, sharded or not; so a training goes on over more of them, or on one.

The same fingerprint resumes; any other starts afresh. A folder is written under a temporary name, flushed, marked
complete and renamed; only then are older ones removed. `complete` holds the fingerprint, the step, and SHA-256 and size
of every other file. They are compared before anything is loaded: a checkpoint that differs is set aside with a line,
and the next older one is taken. Folders with other names are left alone. After the export all but the last is deleted.
That one stays until another training begins (`dsv3.training.leftovers`): the same training, started again, finds itself
finished and exports, so that what DVC could not keep is not computed twice.

No state of data or random numbers is saved: both are functions of the seed and the step.
"""

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dsv3.artifacts import (
    FileContent,
    difference_from,
    file_content,
    read_json,
    read_model,
    read_regular,
    replacing_directory,
)
from dsv3.errors import UserError, one_line
from dsv3.training.background import Background
from dsv3.training.optimizer import AVERAGE
from dsv3.training.sharding import is_sharded

FORMAT_VERSION = 2
"""Of what is written here; part of the fingerprint."""

COMPLETE = "complete"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"
SHARD_INDEX = ".metadata"
STATE_FILES = frozenset({"scheduler.pt", "config.json", "trainer_state.json"})
BEST_FILES, STEP_FILES = frozenset({WEIGHTS}), frozenset({WEIGHTS, OPTIMIZER}) | STATE_FILES
SHARDED_BEST_FILES, SHARDED_STEP_FILES = frozenset({SHARD_INDEX}), frozenset({SHARD_INDEX}) | STATE_FILES
"""And `SHARD_NAME`s."""
SHARD_NAME = re.compile(r"__[0-9]+_[0-9]+\.distcp")
OWN_NAME = re.compile(r"(step|best)_(0|[1-9][0-9]*)")
"""Names of checkpoints and of best weights."""
REMOVABLE_NAME = re.compile(rf"damaged_{OWN_NAME.pattern}|\.{OWN_NAME.pattern}\..+\.tmp|{OWN_NAME.pattern}")
"""Names of all folders that are made here."""
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "first_k_dense_replace", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_nextn_predict_layers",
    "tie_word_embeddings",
)  # fmt: skip
"""What decides the shapes of the weights."""


class Completion(BaseModel):
    """The content of `complete`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    fingerprint: str
    step: int
    files: dict[str, FileContent]


class SavedState(BaseModel):
    """What trainer_state.json holds; `dsv3.training.state` knows the rest."""

    model_config = ConfigDict(extra="allow")

    step: int
    best_step: int = 0


def checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in `directory`, oldest first; their content is not compared."""
    return [path for path in own_folders(directory, "step") if (path / COMPLETE).is_file()]


def own_folders(directory: Path, kind: str) -> list[Path]:
    """Return the folders `kind`_N in `directory`, the lowest step first."""
    found = [path for path in directory.glob(f"{kind}_*") if OWN_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    state: dict[str, Any],
    background: Background | None = None,
) -> None:
    """Write `directory`/step_N, N being `state["step"]`; `state` is what the loop needs to go on, as JSON.

    Where the model is sharded, all processes call this, and `state` is the main one's. With `background`, for such a
    model only, it returns when all that later steps change is copied, and the rest is done beside them.
    """
    texts, step = _state_texts(config, state), state["step"]
    shared, group = is_sharded(model), background.group if background else None

    def write(write_into: Callable[[Path], None]) -> None:
        with replacing_together(directory / f"step_{step}", shared, group) as (folder, is_main_process):
            write_into(folder)
            if is_main_process:
                _write_state(folder, texts, directory.name, step)

    if background is None:
        write(lambda folder: write_tensors(folder, model, optimizer))
        return
    background.wait()  # there is room for one copy
    shards = copied(named_tensors(model, optimizer))
    background.start(lambda: write(lambda folder: write_shards(folder, shards, group)))


def _state_texts(config: Mapping[str, Any], state: dict[str, Any]) -> dict[str, str]:
    """Return what the files beside the tensors hold, by their names."""
    return {"config.json": json.dumps(config, indent=2) + "\n", "trainer_state.json": json.dumps(state)}


def _write_state(folder: Path, texts: Mapping[str, str], fingerprint: str, step: int) -> None:
    """Write the files beside the tensors, and `complete`."""
    # The schedule is a function of the step; this file is for those who look for Hugging Face's layout.
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    _mark_complete(folder, fingerprint, step)


@contextmanager
def replacing_together(path: Path, shared: bool, group: dist.ProcessGroup | None = None) -> Iterator[tuple[Path, bool]]:
    """Yield the folder that will replace `path`, and whether the caller is the main process, which replaces it.

    Where several processes write it, all of the `group` call this (None: of the training); else only the main process.
    """
    if not shared:
        with replacing_directory(path) as folder:
            yield folder, True
        return
    is_main_process = dist.get_rank() == 0
    with replacing_directory(path) if is_main_process else nullcontext(path) as folder:
        names = [folder.name]
        dist.broadcast_object_list(names, src=0, group=group)
        yield path.with_name(names[0]), is_main_process
    dist.barrier(group)


def write_tensors(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Write the weights, and the optimizer's state where one is given, into `folder`."""
    if is_sharded(model):
        write_shards(folder, named_tensors(model, optimizer))
        return
    save_model(model, str(folder / WEIGHTS))
    if optimizer is not None:
        torch.save(optimizer.state_dict(), folder / OPTIMIZER)


def write_shards(folder: Path, shards: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Write what `named_tensors` gave, or a copy of it, into `folder`, together with the other processes."""
    with raising_first_failure():
        dcp.save(shards, checkpoint_id=folder, process_group=group)


@contextmanager
def raising_first_failure() -> Iterator[None]:
    """Raise the error of one process for torch's collection of all of them, which is a BaseException."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def read_tensors(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Load what `write_tensors` wrote into the model and the optimizer in place, however either is cut."""
    if (folder / SHARD_INDEX).is_file():
        read_shards(folder, model, optimizer)
        return
    if is_sharded(model):
        whole: dict[str, Any] = dict(load_file(folder / WEIGHTS))
        whole |= {name: whole[same] for name, same in duplicates(folder / WEIGHTS).items()}
        set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))
    else:
        load_model(model, folder / WEIGHTS)
    if optimizer is not None:
        optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))


def read_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Load what `write_shards` wrote into the model and the optimizer in place, however either is cut.

    torch asks for a state of every parameter. One that had no gradient yet (an MTP module while its weight is 0) has
    none, nor has a training without averages one of these: they begin anew, as they do from an unsharded checkpoint.
    """
    tensors = named_tensors(model, optimizer)
    states = tensors.get("optimizer", {}).get("state", {})
    anew = unwritten(folder, states)
    wanted = {**tensors}
    if optimizer is not None:
        kept = {
            name: {part: value for part, value in state.items() if (name, part) not in anew}
            for name, state in states.items()
        }
        wanted["optimizer"] = {**tensors["optimizer"], "state": {name: state for name, state in kept.items() if state}}
    with warnings.catch_warnings(), raising_first_failure():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        dcp.load(wanted, checkpoint_id=folder, no_dist=not is_sharded(model))
    set_model_state_dict(model, wanted["model"])
    if optimizer is None:
        return
    for name, state in wanted["optimizer"]["state"].items():
        states[name].update(state)
    set_optimizer_state_dict(model, optimizer, {**wanted["optimizer"], "state": states})
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied head has two names
    for name, part in anew:
        optimizer.state[parameters[name]].pop(part, None)


def unwritten(folder: Path, states: Mapping[str, Mapping[str, Any]]) -> set[tuple[str, str]]:
    """Return (parameter, part of its state) that a sharded checkpoint lacks and may lack: whole states, averages."""
    prefix, written = "optimizer.state.", dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    with_state = {key.removeprefix(prefix).rpartition(".")[0] for key in written if key.startswith(prefix)}
    return {
        (name, part)
        for name, state in states.items()
        for part in state
        if f"{prefix}{name}.{part}" not in written and (part == AVERAGE or name not in with_state)
    }


def named_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Return the weights and the optimizer's state by the parameters' names, as torch's checkpoints want them."""
    if optimizer is None:
        return {"model": get_model_state_dict(model)}
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def copied(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return what `named_tensors` gave, with a copy of every tensor in the CPU's memory."""
    stager = DefaultStager(StagingOptions(*[False] * 4))  # neither pinned nor shared memory, in this thread, at once
    try:
        return stager.stage(tensors)  # pyright: ignore[reportReturnType]
    finally:
        stager.close()


def duplicates(file: Path) -> dict[str, str]:
    """Return the names that stand for the tensor of another name: a tied head is written once."""
    with safe_open(file, "pt") as reader:
        return dict(reader.metadata() or {})


def _mark_complete(folder: Path, fingerprint: str, step: int) -> None:
    files = {path.name: file_content(path) for path in sorted(folder.iterdir())}
    completion = Completion(fingerprint=fingerprint, step=step, files=files)
    (folder / COMPLETE).write_text(completion.model_dump_json(), encoding="utf-8")


def damage_of(folder: Path, fingerprint: str | None = None) -> str:
    """Return in a few words how the content of step_N or best_N differs from what was saved; empty where it is whole.

    Every file is read once, in pieces. With a `fingerprint`, its folder and name must be those of the training too.
    """
    try:
        completion = Completion.model_validate_json(read_regular(folder / COMPLETE))
    except OSError as error:
        return f"{COMPLETE} can't be read ({error.strerror})"
    except (ValidationError, UnicodeDecodeError):
        return f"{COMPLETE} is damaged"
    names = {name for name in completion.files if not SHARD_NAME.fullmatch(name)}
    if names not in (STEP_FILES, BEST_FILES, SHARDED_STEP_FILES, SHARDED_BEST_FILES):
        return f"{COMPLETE} is damaged"
    if fingerprint is not None and (completion.fingerprint, completion.step) != (fingerprint, _step_of(folder)):
        return f"it is step {completion.step} of the training {completion.fingerprint}"
    differences = (difference_from(folder / name, content) for name, content in sorted(completion.files.items()))
    return next(filter(None, differences), "")


def set_aside_damaged(directory: Path, with_best: bool, tell: Callable[[str], None]) -> Path | None:
    """Set aside damaged checkpoints from the newest on, `tell` a line for each, and return the newest that is whole.

    With `with_best`, the best weights that it names must be whole too.
    """
    for folder in reversed(own_folders(directory, "step")):
        damage = damage_of(folder, directory.name) or (_damage_of_best(folder) if with_best else "")
        if not damage:
            return folder
        aside = directory / f"damaged_{folder.name}"
        _remove(aside)
        folder.rename(aside)
        tell(f"{folder}: not resumed, damaged: {damage}; set aside as {aside.name}")
    return None


def _damage_of_best(folder: Path) -> str:
    """Return how the best weights that a checkpoint names are damaged; empty where they are whole.

    They may be missing where better ones came later: the training finds these again.
    """
    best = best_folder(folder.parent, read_state(folder).best_step)
    if _step_of(best) == 0 or any(_step_of(path) > _step_of(best) for path in own_folders(folder.parent, "best")):
        return ""
    damage = damage_of(best, folder.parent.name)
    return f"its best weights, {best.name}: {damage}" if damage else ""


def read_state(folder: Path) -> SavedState:
    """Return the loop's state in a checkpoint."""
    return read_model(folder / "trainer_state.json", SavedState, "set runtime.resume to never to train again")


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the weights and the optimizer's state from `folder` in place; return the loop's state.

    The caller has compared the files with `complete`. Raises `UserError` where they are of another model or optimizer.
    """
    try:
        read_tensors(folder, model, optimizer)
    except (SafetensorError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = one_line(error)[:200]
        raise UserError(f"{folder}: does not fit this training ({reason}); name another checkpoint") from None
    return read_state(folder).model_dump(exclude_unset=True)


def check_checkpoint(folder: Path, config: Mapping[str, Any], total_steps: int) -> None:
    """Raise `UserError` unless `folder` is a whole checkpoint of this architecture that leaves steps to be done."""
    where = f"train.resume_from_checkpoint is {folder}"
    if not (folder / COMPLETE).is_file():
        raise UserError(f"{where}; holds no complete checkpoint; name a folder step_N under .checkpoints/")
    damage = damage_of(folder)
    if damage or not (folder / "trainer_state.json").is_file():
        raise UserError(f"{where}; damaged: {damage or 'it holds best weights alone'}; name another checkpoint")
    saved = read_json(folder / "config.json")
    changed = [name for name in SIZES if saved.get(name) != config.get(name)]
    if changed:
        values = ", ".join(f"{name} {saved.get(name)} instead of {config.get(name)}" for name in changed)
        raise UserError(f"{where}; of another architecture ({values}); set model.config to its file")
    step = read_state(folder).step
    if step >= total_steps:
        raise UserError(f"{where}; must be before step {total_steps}, the last; raise train.num_train_epochs")


def save_best(directory: Path, model: nn.Module, step: int) -> None:
    """Write the weights alone to `directory`/best_N; older ones stay until a checkpoint is saved."""
    with replacing_together(best_folder(directory, step), is_sharded(model)) as (folder, is_main_process):
        write_tensors(folder, model, None)
        if is_main_process:
            _mark_complete(folder, directory.name, step)


def load_best(directory: Path, model: nn.Module, step: int) -> None:
    """Load the weights that `save_best` wrote for `step`, in place; raise `UserError` where they are damaged."""
    folder = best_folder(directory, step)
    damage = damage_of(folder, directory.name)
    if damage:
        raise UserError(f"{folder}: damaged: {damage}; run the same again: it goes on from an earlier checkpoint")
    read_tensors(folder, model, None)


def best_folder(directory: Path, step: int) -> Path:
    """Return the folder of the best weights."""
    return directory / f"best_{step}"


def prune(directory: Path, save_total_limit: int, best_step: int) -> None:
    """Remove all but the newest `save_total_limit` checkpoints, other best weights, and what was left half-written.

    `best_step` is the newest checkpoint's. Best weights that are newer stay, as some are where it was written beside
    the steps that followed.
    """
    kept = {*checkpoints(directory)[-save_total_limit:], best_folder(directory, best_step)}
    newest = max(map(_step_of, kept))
    kept |= {path for path in own_folders(directory, "best") if _step_of(path) > newest}
    for path in directory.iterdir():
        if REMOVABLE_NAME.fullmatch(path.name) and path not in kept and not path.name.startswith("damaged_"):
            _remove(path)


def delete_checkpoints(directory: Path, kept: Collection[Path] = ()) -> None:
    """Remove all that was saved in `directory`, whole, half-written or damaged, but for the folders in `kept`."""
    for path in directory.iterdir():
        if REMOVABLE_NAME.fullmatch(path.name) and path not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder, or a link to one without what it leads to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)

"""What a training is going to do, worked out before anything is built: steps, tokens, arithmetic, memory."""

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dsv3.artifacts import check_not_mixed, read_model
from dsv3.data.batches import Batches
from dsv3.data.meta import check_shards, open_stream, read_meta
from dsv3.data.shards import TokenStream
from dsv3.data.tokenizer import SpecialTokens, check_tokenizer
from dsv3.devices import free_bytes, torch_device, total_bytes
from dsv3.errors import UserError
from dsv3.export.model_folder import check_model_folder
from dsv3.params.architecture import Architecture, read_architecture
from dsv3.params.read import Params
from dsv3.params.runtime import Device, RuntimeParams
from dsv3.sizing.flops import training_flops_per_token
from dsv3.sizing.machines import USABLE_SHARE
from dsv3.sizing.memory import GIB, training_memory, without_moments
from dsv3.sizing.report import training_size
from dsv3.sizing.sharded import StateSharing, chosen_sharding, process_memory
from dsv3.tracking.identity import project_root
from dsv3.tracking.metrics import TABLES
from dsv3.training.budget import Budget, budget_of
from dsv3.training.distillation import read_teacher
from dsv3.training.initial_weights import InitialWeights, read_initial_weights
from dsv3.training.schedule import CONSTANT_UNTIL, mtp_loss_weight

RESULTS = ("run.json", "metrics.json", "headline.json", *(f"{table}.tsv" for table in TABLES))
"""What a training writes beside the model."""


@dataclass(frozen=True)
class TrainingPlan:
    """The inputs, checked, and what follows from them."""

    params: Params
    meta: Mapping[str, Any]
    """The token data's meta.json."""

    architecture: Architecture
    batches: Batches
    validation: TokenStream
    budget: Budget
    initial_weights: InitialWeights | None
    """The model that the training starts from; None: from new weights."""

    teachers: Sequence[InitialWeights] = ()
    """The models whose predictions it learns from."""

    sharding_note: str = ""
    """What `runtime.sharding: auto` chose, and why."""

    @property
    def total_steps(self) -> int:
        """Return the optimizer steps of the whole training."""
        return self.budget.total_steps

    @property
    def sequences_per_step(self) -> int:
        """Return the sequences of one optimizer step with the whole batch, over all processes."""
        train = self.params.train
        return train.per_device_train_batch_size * train.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of one optimizer step with the whole batch, over all processes."""
        return self.sequences_per_step * self.params.train.block_size

    def sequences_before(self, step: int) -> int:
        """Return the sequences that the steps before `step` have seen, over all processes."""
        return self.budget.starts[step] * self.params.train.per_device_train_batch_size

    def tokens_before(self, step: int) -> int:
        """Return the tokens that the steps before `step` have seen, over all processes."""
        return self.sequences_before(step) * self.params.train.block_size

    def epochs_before(self, step: int) -> float:
        """Return the passes over the training tokens that the steps before `step` have made."""
        return self.sequences_before(step) / self.batches.num_blocks_per_epoch

    def flops(self, steps: range) -> float:
        """Return the arithmetic of these steps; MTP modules count where lambda is not 0: else they are not asked."""
        train, main = self.params.train, self.architecture.model_copy(update={"num_nextn_predict_layers": 0})
        per_token = [training_flops_per_token(part, train.block_size) for part in (main, self.architecture)]
        end = bisect_left(steps, CONSTANT_UNTIL * self.budget.total, key=self.budget.starts.__getitem__)
        total = 0.0
        for part in filter(len, (steps[:end], steps[end:])):  # lambda is one number in each
            asks_modules = mtp_loss_weight(part.start, train, self.budget) != 0
            total += per_token[asks_modules] * (self.tokens_before(part.stop) - self.tokens_before(part.start))
        return total

    @property
    def size(self) -> dict[str, int | float]:
        """Return the estimates of parameters, memory and arithmetic."""
        return training_size(self.architecture, self.params.train)

    def notes(self) -> list[str]:
        """Return lines on what is allowed and rarely meant."""
        every = self.params.train.eval_steps
        if every <= self.total_steps:
            return []
        return [f"note     train.eval_steps is {every}, more than all steps: validated once, at the end"]

    def summary(self) -> str:
        """Return the plan in a few lines."""
        train, size = self.params.train, self.size
        total_tokens, total_flops = self.tokens_before(self.total_steps), self.flops(range(self.total_steps))
        return "\n".join(
            (
                f"model    {self.params.model.config}: {size['parameters_total']:,} parameters, "
                f"{size['parameters_active']:,} active per token, {size['parameters_mtp']:,} for MTP",
                f"data     {len(self.batches.stream):,} training tokens, {len(self.validation):,} for validation",
                f"steps    {self.total_steps:,} of {self.tokens_per_step:,} tokens "
                f"({self.sequences_per_step} sequences of {train.block_size}): "
                f"{total_tokens:,} tokens, {self.epochs_before(self.total_steps):.2f} epochs",
                f"cost     {total_flops / total_tokens:.3g} FLOPs per token, "
                f"{total_flops:.3g} in all{', without the teachers' if self.teachers else ''}",
                *([f"weights  those of {self.initial_weights}"] if self.initial_weights else []),
                *(f"teacher  {teacher}" for teacher in self.teachers),
                *self.notes(),
                f"memory   {size['training_cpu_peak_gib']} GiB estimated on a CPU, "
                f"{size['training_cuda_peak_gib']} GiB on a GPU",
            )
        )


def introduction(plan: TrainingPlan) -> str:
    """Return the plan in a few lines, for the device that it would run on."""
    runtime = plan.params.runtime
    device = torch_device(runtime)
    device_type = runtime.device_type(has_cuda=device.type == "cuda")
    # Of a sharded training it is not known: what lies gathered at its peak is the engine's choice.
    is_whole = runtime.sharding == "none"
    note = memory_note(plan, device_type, free_bytes(device), runtime.num_processes) if is_whole else None
    return "\n".join([plan.summary(), *([plan.sharding_note] if plan.sharding_note else []), *([note] if note else [])])


def launched_processes(runtime: RuntimeParams) -> tuple[int, int]:
    """Return the processes that a launcher has started, or that `runtime` asks for: all of them, and this machine's."""
    started = {name: int(os.environ.get(name, runtime.num_processes)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    return started["WORLD_SIZE"], started["LOCAL_WORLD_SIZE"]


def with_chosen_sharding(params: Params, architecture: Architecture) -> tuple[Params, str]:
    """Return `params` with what `runtime.sharding: auto` chooses here, and the line that says so; else unchanged.

    By the device's memory, not by what is free, so that equal machines choose the same.
    """
    runtime = params.runtime
    if runtime.sharding != "auto":
        return params, ""
    device, processes = torch_device(runtime), launched_processes(runtime)
    device_type = runtime.device_type(has_cuda=device.type == "cuda")
    num_sharing = processes[1] if device_type == "cpu" else 1  # a CPU's memory is shared by this machine's processes
    usable = int(USABLE_SHARE[device_type] * total_bytes(device)) // num_sharing
    if runtime.cpu_offload == "optimizer":
        chosen, reason = "none", "for runtime.cpu_offload"
    elif processes[0] > 1 and (runtime.expert_parallel > 1 or runtime.cpu_offload == "parameters"):
        chosen, reason = "full", "for runtime.expert_parallel and runtime.cpu_offload"
    else:
        chosen = chosen_sharding(architecture, params.train, device_type, processes, usable)
        copies = StateSharing(1, num_copies=processes[0])
        needed = process_memory(architecture, params.train, device_type, copies).peak_bytes
        reason = f"{needed / GIB:.2f} GiB with none, {usable / GIB:.2f} usable"
    line = f"sharding {chosen} (auto: {processes[0]} processes, {reason})"
    changes = {"sharding": chosen, "async_save": runtime.async_save and chosen != "none"}
    return params.model_copy(update={"runtime": runtime.model_copy(update=changes)}), line


def memory_note(plan: TrainingPlan, device_type: Device, free: int, num_processes: int) -> str | None:
    """Return a line where the training's estimate exceeds the `free` bytes, with what would fit; None where it fits.

    The processes of a machine share a CPU's memory, and each has a GPU of its own. It is a note, not an error: memory
    that others hold now may be free later, and a system may have more than it says.
    """
    num_sharing = num_processes if device_type == "cpu" else 1

    def needed(**changes: int | bool) -> int:
        train = plan.params.train.model_copy(update=changes)
        memory = training_memory(plan.architecture, train, device_type)
        if device_type == "cuda" and plan.params.runtime.cpu_offload == "optimizer":
            memory = without_moments(memory, plan.architecture, train)
        return num_sharing * memory.peak_bytes

    if needed() <= free:
        return None
    batch = plan.params.train.per_device_train_batch_size
    fitting = next((n for n in range(batch - 1, 0, -1) if needed(per_device_train_batch_size=n) <= free), None)
    remedies = [f"train.per_device_train_batch_size {fitting}"] if fitting else []
    if needed(gradient_checkpointing=True) <= free:
        remedies.append("train.gradient_checkpointing true")
    return f"note     needs {needed() / GIB:.2f} GiB on {device_type}, {free / GIB:.2f} are free: try " + (
        " or ".join(remedies) or "train.adam_moments_dtype bf16, or a smaller model"
    )


class DescribedOrigin(BaseModel):
    """What a training takes from the origin that the corpus's manifest states."""

    model_config = ConfigDict(extra="allow", strict=True)

    hub_id: str | None = None


class Described(BaseModel):
    """What a training takes from the corpus's manifest, for itself and for the model card; the rest is recorded."""

    model_config = ConfigDict(extra="allow", strict=True)

    source: str
    sha256: str
    origin: DescribedOrigin = DescribedOrigin()
    license: str | None = None
    title: str | None = None
    language: str | None = None
    prompt: str | None = None


def check_tokens(tokens: Path) -> str:
    """Return a line on the shards of a training; raise `UserError` where one, or the tokenizer, is not as written."""
    meta = read_meta(tokens)
    special = SpecialTokens(meta.bos_token_id, meta.eos_token_id)
    check_tokenizer(tokens / "tokenizer", meta.tokenizer_sha256, special)
    return check_shards(tokens, meta, ("train", "validation"))


def read_training_plan(params: Params, tokens: Path) -> TrainingPlan:
    """Return the plan; raise `UserError` for an input that is missing, or that does not fit the parameters."""
    meta = read_meta(tokens)
    architecture = read_architecture(Path(params.model.config))
    vocab_size = architecture.vocab_size
    if meta.vocab_size > vocab_size:
        raise UserError(
            f"{tokens}: its tokenizer has {meta.vocab_size} tokens; must be <= {vocab_size}, "
            f"the vocab_size of {params.model.config}; lower tokenize.vocab_size"
        )
    batches = Batches(open_stream(tokens, meta, "train"), params.train.block_size, params.seed)
    validation = open_stream(tokens, meta, "validation")
    if len(validation) < 2:
        raise UserError(f"{tokens}: {len(validation)} tokens for validation; must be >= 2; raise validation_fraction")
    budget = budget_of(params.train, batches.num_blocks_per_epoch)
    name = params.train.init_from
    initial_weights = read_initial_weights(name, Path(params.model.config), tokens) if name is not None else None
    teachers = [read_teacher(teacher, vocab_size, params.train.block_size, tokens) for teacher in params.train.teachers]
    params, note = with_chosen_sharding(params, architecture)
    plan = TrainingPlan(
        params, meta.model_dump(), architecture, batches, validation, budget, initial_weights, teachers, note
    )
    check_steps(plan)
    return plan


def check_steps(plan: TrainingPlan) -> None:
    """Raise `UserError` for a batch that the data does not allow."""
    train, available, sequences = plan.params.train, plan.batches.num_blocks_per_epoch, plan.sequences_per_step
    if sequences > available:
        raise UserError(
            f"params.yaml: train.per_device_train_batch_size * train.gradient_accumulation_steps is {sequences}; must "
            f"be <= {available}, the sequences of {train.block_size} tokens in the text, or a step sees one twice"
        )


def read_manifest(corpus: Path) -> dict[str, Any]:
    """Return the corpus's manifest."""
    check_output(corpus / "manifest.json", "download")
    manifest = read_model(corpus / "manifest.json", Described, "run the download stage again")
    return manifest.model_dump(exclude_unset=True)


def check_folders(model: Path, results: Path, tokens: Path) -> None:
    """Raise `UserError` where a training would replace what others wrote, or where DVC would refuse what it writes."""
    check_model_folder(model, tokens)
    check_not_mixed(results, RESULTS)
    check_unlinked(model, results)


def check_unlinked(*paths: Path) -> None:
    """Raise `UserError` where a link leads one of the paths out of the project: DVC would refuse the output."""
    root = project_root().absolute()
    for path in paths:
        if not path.absolute().is_relative_to(root) or path.parent.resolve().is_relative_to(root.resolve()):
            continue
        link = next(parent for parent in path.absolute().parents if parent.is_symlink())
        raise UserError(
            f"{path}: the link {link} leads out of the project, where DVC takes no outputs; remove it, and run: dvc "
            "cache dir --local FOLDER && dvc config --local cache.type symlink, to keep large files on another disk"
        )


def check_output(path: Path, stage: str) -> None:
    """Raise `UserError` unless `stage` has written `path`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; run dvc repro {stage}")

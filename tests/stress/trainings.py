"""Small trainings in several forms, begun anew as often as wanted, beside what each gives when nothing disturbs it."""

import csv
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3.artifacts import sha256_file
from tests.stress.processes import Failure, Process, Zygote, environment
from tests.training_inputs import ROOT, WIDE, stage_command, write_inputs

STEPS = {"max_steps": 12, "eval_steps": 4}
RUNTIME = {"save_steps": 3, "save_total_limit": 2}
FORMS: dict[str, dict[str, Any]] = {
    "muon fp32 mtp": {},
    "adamw fp32, averaged": {
        "train": {"optim": "adamw", "ema_decay": 0.9},
        "architecture": {"num_nextn_predict_layers": 0},
    },
    "muon bf16, bf16 moments": {"train": {"precision": "bf16", "adam_moments_dtype": "bf16"}},
    "adamw fp8 mtp": {"train": {"optim": "adamw", "use_fp8": True}, "architecture": WIDE},
    "muon, accumulation 4, best at end": {
        "train": {"gradient_accumulation_steps": 4, "batch_ramp_levels": 2, "load_best_model_at_end": True},
    },
    "batches by workers, checkpointing": {
        "train": {"gradient_checkpointing": True},
        "runtime": {"dataloader_num_workers": 1},
    },
    "muon, four steps": {
        "train": {"max_steps": 4, "eval_steps": 2, "load_best_model_at_end": True},
        "runtime": {"save_steps": 2},
    },
}
SHARDED_FORMS: dict[str, dict[str, Any]] = {
    "sharded, muon mtp": {"runtime": {"sharding": "full"}},
    "sharded, adamw fp8, accumulation 4": {
        "train": {"optim": "adamw", "use_fp8": True, "gradient_accumulation_steps": 4},
        "architecture": WIDE,
        "runtime": {"sharding": "full"},
    },
    "sharded, bf16 moments, best at end": {
        "train": {
            "optim": "adamw",
            "adam_moments_dtype": "bf16",
            "ema_decay": 0.9,
            "load_best_model_at_end": True,
        },
        "runtime": {"sharding": "full"},
    },
    "sharded, experts over two": {"runtime": {"sharding": "full", "expert_parallel": 2}},
    "sharded, saved beside the steps, best at end": {
        "train": {"load_best_model_at_end": True, "eval_steps": 2},
        "runtime": {"sharding": "full", "async_save": True},
    },
}
"""Forms for two processes."""
TIMES = {"step_s", "tokens_per_s", "peak_memory_bytes", "model_flops_per_s"}
"""Columns that differ from run to run."""


class Trainings:
    """Everything below one folder."""

    def __init__(self, root: Path, zygote: Zygote) -> None:
        self.root = root / "trainings"
        self.kept = root / "kept"
        """What more than one trial uses."""
        self.zygote = zygote
        self.kept.mkdir(parents=True)
        self.clear()
        self._undisturbed: dict[tuple[str, int], dict[str, Any]] = {}
        self.fastest: dict[tuple[str, int], float] = {}
        """Seconds of an undisturbed training, by form and number of processes."""
        self._num = 0

    def clear(self) -> None:
        """Remove the folders of all trainings."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()

    def fresh(self, form: str, **runtime: Any) -> Path:
        """A new folder with the inputs of a training, which has not begun."""
        self._num += 1
        folder = self.root / f"training{self._num}"
        sections = {**FORMS, **SHARDED_FORMS}[form]
        write_inputs(
            folder,
            train={**STEPS, **sections.get("train", {})},
            architecture=sections.get("architecture", {}),
            runtime={**RUNTIME, **sections.get("runtime", {}), **runtime},
        )
        return folder

    def remembered(self, name: str, make: Callable[[], Path]) -> Path:
        """The folder that `make` makes, which is made once and stays."""
        kept = self.kept / name.replace(" ", "_")
        return kept if kept.exists() else moved_copy(make(), kept)

    def copied(self, folder: Path) -> Path:
        """A copy of a folder, in which the training goes on."""
        self._num += 1
        return moved_copy(folder, self.root / f"training{self._num}")

    def start(self, folder: Path, crash_at: int = 0, **variables: str) -> Process:
        """Start the train stage in `folder`."""
        return self.zygote.start("stages.train", stage_command(folder)[3:], folder, crash_at, **variables)

    def start_two(self, folder: Path) -> list[Process]:
        """Start the two workers of a training with two processes, as a launcher would."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run_id = f"stress{random.SystemRandom().randrange(1 << 32)}"
        return [
            self.start(folder, RANK=rank, LOCAL_RANK=rank, TORCHELASTIC_RUN_ID=run_id, **common) for rank in ("0", "1")
        ]

    def finish(self, folder: Path, num_processes: int = 1) -> str:
        """Run the training from where it is to its end, which must be a good one; return what it has written."""
        started = [self.start(folder)] if num_processes == 1 else self.start_two(folder)
        texts = [process.finished() for process in started]
        return texts[0]

    def undisturbed(self, form: str, num_processes: int = 1) -> dict[str, Any]:
        """What an undisturbed training gives."""
        key = form, num_processes
        if key not in self._undisturbed:
            for _ in range(2):  # the first reads files that the second finds in memory
                folder, began = self.fresh(form), time.monotonic()
                self.finish(folder, num_processes)
                self.fastest[key] = time.monotonic() - began
            self._undisturbed[key] = result(folder)
        return self._undisturbed[key]

    def check(self, form: str, folder: Path, num_processes: int = 1) -> None:
        """Raise `Failure` unless the training in `folder` ended as an undisturbed one, bit for bit."""
        found, expected = result(folder), self.undisturbed(form, num_processes)
        for name, value in expected.items():
            if found[name] != value:
                raise Failure(f"{folder}: {name} differs from an undisturbed training's ({form})")

    def check_zygote(self) -> None:
        """Raise `Failure` unless a process of its own trains what a forked one does."""
        form = next(iter(FORMS))
        folder = self.fresh(form)
        subprocess.run(
            [sys.executable, *stage_command(folder)[1:]],
            cwd=ROOT,
            env={**environment(), "DVC_ROOT": str(folder)},
            check=True,
            capture_output=True,
        )
        self.check(form, folder)


def moved_copy(folder: Path, target: Path) -> Path:
    """Copy a training to `target`, and have its parameters name the files there."""
    shutil.copytree(folder, target)
    params = target / "params.yaml"
    params.write_text(params.read_text(encoding="utf-8").replace(str(folder), str(target)), encoding="utf-8")
    return target


def result(folder: Path) -> dict[str, Any]:
    """What a training has computed: digests of weights and kept weights, and its tables without times."""
    found: dict[str, Any] = {"the model": sha256_file(folder / "final_model" / "model.safetensors")}
    (last,) = folder.glob(".checkpoints/*/step_*")
    weights = last / "model.safetensors"  # a sharded training's lie in the files of its processes
    found["the last checkpoint"] = last.name, sha256_file(weights) if weights.exists() else ""
    for table in ("history", "validation", "router"):
        with (folder / "results" / f"{table}.tsv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        found[table] = [{name: cell for name, cell in row.items() if name not in TIMES} for row in rows]
    return found

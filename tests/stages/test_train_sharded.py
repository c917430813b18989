"""The train stage over shards: stopped, killed, gone on with other processes."""

import json
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dsv3.errors import LOST_PROCESS_STATUS
from tests.stages.test_train import interrupt_once_saved, start_until_saved
from tests.training_inputs import run_stage, trained_folder, warm_python, write_inputs

SHARDED = {"num_processes": 2, "sharding": "full", "save_steps": 2}
MODEL = "final_model/model.safetensors"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_folder(tmp_path_factory.mktemp("sharded"), runtime=SHARDED | {"keep_last_checkpoint": True})


@pytest.mark.parametrize("async_save", [False, True])
def test_a_stopped_training_goes_on_to_the_same_bytes(tmp_path, uninterrupted, async_save):
    write_inputs(tmp_path, runtime=SHARDED | {"async_save": async_save})
    returned, errors = interrupt_once_saved(tmp_path, signal.SIGTERM, warm_python())
    assert returned == 143, errors
    assert "saved" in errors
    saved = sorted(tmp_path.glob(".checkpoints/*/step_*"))[-1]
    assert {path.name for path in saved.iterdir()} >= {".metadata", "__0_0.distcp", "__1_0.distcp", "complete"}
    write_inputs(tmp_path, runtime=SHARDED | {"resume": "must", "async_save": async_save})
    done = run_stage(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / MODEL).read_bytes() == (uninterrupted / MODEL).read_bytes()
    assert (tmp_path / "results" / "router.tsv").read_bytes() == (uninterrupted / "results" / "router.tsv").read_bytes()


def test_modules_that_were_not_asked_yet_begin_after_a_stop_as_without_one(tmp_path):
    """A stop in the first 67.6 % of the steps, where the prediction modules have no gradient and so no moments."""
    late = {"mtp_loss_weight": 0.0, "mtp_loss_weight_final": 0.3}
    whole = trained_folder(tmp_path / "whole", train=late, runtime=SHARDED)
    write_inputs(tmp_path / "stopped", train=late, runtime=SHARDED)
    returned, errors = interrupt_once_saved(tmp_path / "stopped", signal.SIGTERM, warm_python())
    assert returned == 143, errors
    saved = sorted((tmp_path / "stopped").glob(".checkpoints/*/step_*"), key=lambda path: int(path.name[5:]))[-1]
    assert int(saved.name[5:]) < 8, "of 12 steps the modules are asked from the ninth on"
    write_inputs(tmp_path / "stopped", train=late, runtime=SHARDED | {"resume": "must"})
    done = run_stage(tmp_path / "stopped")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "stopped" / MODEL).read_bytes() == (whole / MODEL).read_bytes()


def test_a_killed_process_ends_the_others_with_a_line_and_the_training_goes_on_to_the_same_bytes(
    tmp_path, uninterrupted
):
    write_inputs(tmp_path, runtime=SHARDED | {"save_steps": 1})
    process = start_until_saved(tmp_path)
    workers = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    os.kill(workers[0].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 137, errors
    lines = errors.splitlines()
    assert not any("Traceback" in line for line in lines), errors
    assert sum("a process was killed" in line for line in lines) == 1
    write_inputs(tmp_path, runtime=SHARDED | {"resume": "must"})
    done = run_stage(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / MODEL).read_bytes() == (uninterrupted / MODEL).read_bytes()


def test_shards_of_one_processs_checkpoint_are_exported_as_its_files(tmp_path):
    write_inputs(tmp_path, runtime={"keep_last_checkpoint": True})
    assert run_stage(tmp_path).returncode == 0
    exported = {path.name: path.read_bytes() for path in (tmp_path / "final_model").iterdir()}
    shutil.rmtree(tmp_path / "final_model")
    write_inputs(tmp_path, runtime=SHARDED | {"resume": "must"})
    done = run_stage(tmp_path)
    assert done.returncode == 0, done.stderr
    again = {path.name: path.read_bytes() for path in (tmp_path / "final_model").iterdir()}
    assert [name for name in exported if again[name] != exported[name]] == []


def going_on_from(checkpoint: Path, folder: Path, num_processes: int, **train: Any) -> subprocess.CompletedProcess[str]:
    """Run a longer training from a named checkpoint, whose one step hardly moves the weights, to its end."""
    still = {"max_steps": 13, "learning_rate": 1e-10, "bias_update_rate": 0.0}
    sharding = {"num_processes": num_processes, "sharding": "full" if num_processes > 1 else "none"}
    write_inputs(folder, train={**still, "resume_from_checkpoint": str(checkpoint), **train}, runtime=sharding)
    return run_stage(folder)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_longer_training_goes_on_from_a_named_checkpoint_of_shards(tmp_path, uninterrupted, num_processes):
    (last,) = uninterrupted.glob(".checkpoints/*/step_12")
    done = going_on_from(last, tmp_path, num_processes)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results" / "metrics.json").read_text())["step"] == 13
    before, after = load_file(uninterrupted / MODEL), load_file(tmp_path / MODEL)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ({"max_steps": 12}, "must be before step 12, the last"),
        ({"optim": "adamw"}, "does not fit this training (Missing"),
    ],
    ids=str,
)
def test_processes_that_may_not_go_on_from_a_named_checkpoint_end_together_in_one_line(
    tmp_path, uninterrupted, train, reason
):
    (last,) = uninterrupted.glob(".checkpoints/*/step_12")
    done = going_on_from(last, tmp_path, 2, **train)
    assert done.returncode == 2, done.stderr
    said = done.stderr.replace("\n", "")  # by each of the two processes; an end of line may come after the other's text
    assert said == 2 * said[: len(said) // 2]
    assert said.count(reason) == said.count(str(last)) == 2


def stop_one(folder: Path, rank: str) -> tuple[int, str, float]:
    """Train with two processes, stop that one; return the status, stderr and the seconds that the rest took to end."""
    write_inputs(folder, runtime=SHARDED | {"save_steps": 1})
    process = start_until_saved(folder)
    workers = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    workers[rank].suspend()
    started_at = time.monotonic()
    _, errors = process.communicate(timeout=100)
    return process.returncode, errors, time.monotonic() - started_at


@pytest.fixture(scope="module")
def with_one_stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, str, float]]:
    """Folder and end of two trainings, by which process was stopped; both at once, for most of it is waiting."""
    folders = {rank: tmp_path_factory.mktemp(f"stopped{rank}") for rank in "01"}
    with ThreadPoolExecutor() as pool:
        ends = pool.map(stop_one, folders.values(), folders)
        return {rank: (folder, *end) for (rank, folder), end in zip(folders.items(), ends, strict=True)}


@pytest.mark.parametrize("stopped", ["0", "1"])
def test_a_stopped_process_ends_the_others_with_a_line_within_a_minute_and_the_training_goes_on(
    with_one_stopped, uninterrupted, stopped
):
    folder, status, errors, seconds = with_one_stopped[stopped]
    assert status == LOST_PROCESS_STATUS, errors
    assert seconds < 60
    (line,) = [line for line in errors.splitlines() if "process" in line]
    assert line.startswith(f"no sign of life from process {stopped} of this training for 15 s")
    assert "Traceback" not in errors
    write_inputs(folder, runtime=SHARDED | {"resume": "must"})
    done = run_stage(folder)
    assert done.returncode == 0, done.stderr
    assert (folder / MODEL).read_bytes() == (uninterrupted / MODEL).read_bytes()

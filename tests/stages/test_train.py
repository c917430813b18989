import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training_inputs import ROOT, environment, run_stage, stage_command, write_inputs

TWELVE_STEPS = {"runtime": {"logging_steps": 2, "save_steps": 5, "trackers": []}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_inputs(folder)
    done = run_stage(folder)
    assert done.returncode == 0, done.stderr
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final_model" / "model.safetensors")


def columns(folder: Path, table: str, *names: str) -> list[tuple[str, ...]]:
    with (folder / "results" / f"{table}.tsv").open() as file:
        return [tuple(row[name] for name in names) for row in csv.DictReader(file, delimiter="\t")]


def interrupt_once_saved(folder: Path, number: int) -> tuple[int, str]:
    """Start the stage, send the signal when the first checkpoint stands, return the exit status and stderr."""
    process = subprocess.Popen(
        stage_command(folder),
        cwd=ROOT,
        env=environment(folder),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob(".checkpoints/*/step_*/complete")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_a_training_writes_a_model_its_curves_and_its_metrics(uninterrupted):
    metrics = json.loads((uninterrupted / "results" / "metrics.json").read_text())
    assert metrics["step"] == 12
    assert metrics["tokens_seen"] == 12 * 2 * 2 * 32
    assert metrics["experts"].startswith("dsv3_")
    assert json.loads((uninterrupted / "results" / "run.json").read_text())["step"] == 12
    assert [step for (step,) in columns(uninterrupted, "history", "step")] == ["2", "4", "6", "8", "10", "12"]
    assert [step for (step,) in columns(uninterrupted, "validation", "step")] == ["5", "10", "12"]
    assert (uninterrupted / "final_model" / "modeling_deepseek.py").is_file()


def test_no_checkpoint_is_left_behind_a_finished_training(uninterrupted):
    assert list((uninterrupted / ".checkpoints").iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_training_stopped_by_a_signal_goes_on_to_bit_identical_weights(tmp_path, uninterrupted, number, status):
    # Slow enough that the signal finds it at work: a checkpoint and a validation after every step.
    write_inputs(tmp_path, runtime={"save_steps": 1})
    returned, errors = interrupt_once_saved(tmp_path, number)
    assert returned == status, errors
    assert "saved" in errors.splitlines()[-1]
    assert not (tmp_path / "final_model").exists()
    write_inputs(tmp_path, runtime={"save_steps": 5})  # another cadence is no other training
    done = run_stage(tmp_path)
    assert done.returncode == 0, done.stderr
    expected = weights(uninterrupted)
    for name, weight in weights(tmp_path).items():
        assert torch.equal(weight, expected[name]), name
    for table, names in (("history", ("step", "loss", "grad_norm")), ("router", ("step", "layer", "max_vio"))):
        assert columns(tmp_path, table, *names) == columns(uninterrupted, table, *names)

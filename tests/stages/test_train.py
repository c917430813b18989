import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.training_inputs import ROOT, environment, run_stage, stage_command, trained_folder, write_inputs
from tests.warm_python import EXECUTABLE


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_folder(tmp_path_factory.mktemp("uninterrupted"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final_model" / "model.safetensors")


def columns(folder: Path, table: str, *names: str) -> list[tuple[str, ...]]:
    with (folder / "results" / f"{table}.tsv").open() as file:
        return [tuple(row[name] for name in names) for row in csv.DictReader(file, delimiter="\t")]


def start_until_saved(folder: Path, python: str = sys.executable) -> subprocess.Popen[str]:
    """Start the stage; return its process when the first checkpoint stands."""
    process = subprocess.Popen(
        [python, *stage_command(folder)[1:]],
        cwd=ROOT,
        env={**environment(folder), EXECUTABLE: python},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not list(folder.glob(".checkpoints/*/step_*/complete")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint yet"
        time.sleep(0.002)
    return process


def interrupt_once_saved(folder: Path, number: int, python: str = sys.executable) -> tuple[int, str]:
    """Start the stage, send the signal when the first checkpoint stands, return the exit status and stderr."""
    process = start_until_saved(folder, python)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=100)
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


def test_one_checkpoint_is_left_behind_a_finished_training(uninterrupted):
    left = [path.name for path in uninterrupted.glob(".checkpoints/[!l]*/*")]
    assert sorted(left) == ["facts.json", "step_12"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_data_workers_leave_signals_to_the_training_and_it_goes_on_to_bit_identical_weights(
    tmp_path, uninterrupted, number
):
    """As Ctrl-C in a terminal and the end of a scheduler's job do, the signal reaches the data workers too."""
    write_inputs(tmp_path, runtime={"save_steps": 1, "dataloader_num_workers": 2})
    process = start_until_saved(tmp_path)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number, errors
    assert "saved" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    done = run_stage(tmp_path)
    assert done.returncode == 0, done.stderr
    expected = weights(uninterrupted)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(tmp_path).items())


def test_a_data_worker_that_is_killed_is_told_in_one_line_and_the_training_goes_on(tmp_path, uninterrupted):
    write_inputs(tmp_path, runtime={"save_steps": 1, "dataloader_num_workers": 1})
    process = start_until_saved(tmp_path)
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    assert re.search(
        r"^DataLoader worker \(pid.* set runtime.dataloader_num_workers to 0; dvc repro goes on", errors, re.M
    )
    done = run_stage(tmp_path)
    assert done.returncode == 0, done.stderr
    expected = weights(uninterrupted)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(tmp_path).items())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_training_stopped_by_a_signal_goes_on_to_bit_identical_weights(tmp_path, uninterrupted, number, status):
    # Slow enough that the signal finds it at work: a checkpoint after every step.
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


def test_two_processes_train_what_one_does_and_stop_and_go_on_as_one_does(tmp_path, uninterrupted):
    write_inputs(tmp_path, runtime={"num_processes": 2, "save_steps": 1})
    returned, errors = interrupt_once_saved(tmp_path, signal.SIGTERM)
    assert returned == 143, errors
    assert "saved" in errors
    done = run_stage(tmp_path)
    assert done.returncode == 0, done.stderr
    expected = weights(uninterrupted)
    for name, weight in weights(tmp_path).items():
        # Two micro-batches' gradients are added once, in either order: with more, the sums would differ by rounding.
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    for names in (("step", "layer", "max_vio", "max_vio_batch", "entropy", "dead_experts", "bias_min", "bias_max"),):
        assert columns(tmp_path, "router", *names) == columns(uninterrupted, "router", *names)
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert metrics["num_processes"] == 2


def test_a_mistake_in_a_worker_is_told_in_its_one_line(tmp_path):
    write_inputs(tmp_path, runtime={"num_processes": 2, "resume": "must"})
    done = run_stage(tmp_path)
    assert done.returncode == 2
    told = set(done.stderr.splitlines())
    assert len(told) == 1, done.stderr
    assert "runtime.resume is must" in told.pop()


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    write_inputs(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = run_stage(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    for fact in ("37,216 parameters", "34,144 active", "12,864 for MTP", "12 of 128 tokens", "FLOPs", "GiB"):
        assert fact in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("tokens/meta.json", "run dvc repro tokenize"),
        ("accepted.txt", "run dvc repro estimate_size"),
        ("corpus/manifest.json", "run dvc repro download"),
        ("tokens/train_00000.bin", "run the tokenize stage"),
    ],
)
def test_a_missing_input_is_told_in_one_line(tmp_path, missing, remedy):
    write_inputs(tmp_path)
    (tmp_path / missing).unlink()
    done = run_stage(tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert missing in done.stderr
    assert remedy in done.stderr


def test_a_tokenizer_larger_than_the_models_vocabulary_is_told_in_one_line(tmp_path):
    write_inputs(tmp_path)
    meta = json.loads((tmp_path / "tokens" / "meta.json").read_text())
    (tmp_path / "tokens" / "meta.json").write_text(json.dumps({**meta, "vocab_size": 273}))
    done = run_stage(tmp_path)
    assert done.returncode == 2
    assert "has 273 tokens; must be <= 272" in done.stderr
    assert not (tmp_path / "results").exists()


def test_the_log_in_aim_ends_with_the_trainings_last_line(tmp_path, monkeypatch):
    Repo = pytest.importorskip("aim", reason="Aim has no wheels for this Python").Repo
    write_inputs(tmp_path, runtime={"trackers": ["aim"]})
    monkeypatch.setenv("DVC_STAGE", "train")  # outside of DVC the terminal is not recorded
    done = run_stage(tmp_path)
    assert done.returncode == 0, done.stderr
    # without the index, which only `aim up` fills
    shutil.copytree(tmp_path / ".aim", tmp_path / "copy" / ".aim", ignore=shutil.ignore_patterns("index", "LOCK"))
    (run,) = Repo.from_path(str(tmp_path / "copy")).iter_runs()
    lines = [line.data for line in run.get_terminal_logs().values.values_list()]
    assert any(line in done.stdout and "nats/char" in line for line in lines[-2:])


def test_a_folder_with_others_files_is_refused_before_the_training(tmp_path):
    write_inputs(tmp_path)
    (tmp_path / "final_model").mkdir()
    (tmp_path / "final_model" / "thesis.txt").write_text("precious")
    done = run_stage(tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith(
        "final_model: holds thesis.txt, which is not written here and would be lost; name another folder\n"
    )
    assert (tmp_path / "final_model" / "thesis.txt").read_text() == "precious"


def test_a_folder_with_others_results_is_refused_before_the_training(tmp_path):
    write_inputs(tmp_path)
    (tmp_path / "results").mkdir()
    for name in ("metrics.json", "expert_load.tsv"):
        (tmp_path / "results" / name).write_text("the evaluation's")
    done = run_stage(tmp_path)
    assert done.returncode == 2
    assert "results: holds metrics.json, which would be replaced, beside expert_load.tsv" in done.stderr
    assert (tmp_path / "results" / "metrics.json").read_text() == "the evaluation's"


def test_an_earlier_model_and_its_results_are_replaced(tmp_path, uninterrupted):
    for name in ("final_model", "results"):
        shutil.copytree(uninterrupted / name, tmp_path / name)
    trained_folder(tmp_path)


def test_outside_a_terminal_a_training_prints_a_line_per_validation_and_no_bar(uninterrupted, tmp_path):
    write_inputs(tmp_path)
    done = run_stage(tmp_path)
    assert "step 5: validation " in done.stderr
    assert "train: step 12 of 12, 00:00 left, loss " in done.stderr
    assert "\r" not in done.stderr

import os
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dsv3.errors import UserError
from dsv3.training import launch
from tests.committed import DEFAULTS
from tests.training_inputs import ROOT, run_stage, started_run, write_inputs


@pytest.mark.parametrize(
    ("statuses", "seconds_between", "told"),
    [
        ({1: 2, 0: -15}, 0, 2),  # a mistake in the second worker; the first was told to stop
        ({0: 2, 1: -15}, 0, 2),
        ({0: 75, 1: -9}, 1, 137),  # the first missed the second, and was noticed before it
        ({1: -9, 0: 143}, 2, 137),  # the second was killed for its memory; the first saved and went
        ({0: 75, 1: -9}, 30, 75),  # the second hung, and torch's agent killed it in the end
        ({0: 75}, 0, 75),  # the process that was lost is another machine's
    ],
)
def test_the_status_is_that_of_the_worker_that_failed_first(
    statuses, seconds_between, told, monkeypatch, tmp_path, caplog
):
    def fail(*_: object) -> None:
        failures = {}
        for number, (rank, status) in enumerate(statuses.items()):
            failure = ProcessFailure(local_rank=rank, pid=1, exitcode=status, error_file=str(tmp_path / "none"))
            failure.timestamp = 1_000 + number * seconds_between
            failures[rank] = failure
        raise ChildFailedError("train", failures)

    monkeypatch.setattr(launch, "elastic_launch", lambda *_: fail)
    with pytest.raises(SystemExit) as stopped:
        launch.run_workers(2, "stages.train", [])
    assert stopped.value.code == told
    assert ("memory runs out" in caplog.text) == (told == 128 + 9)


def test_under_nohup_workers_do_not_hear_that_the_terminal_has_gone(tmp_path):
    """torch's launcher would handle the signal, and its workers would start with the system's own answer to it."""
    (tmp_path / "told.py").write_text("import signal; print(signal.getsignal(signal.SIGHUP).name, flush=True)")
    program = (
        "import signal; from dsv3.training.launch import run_workers; "
        "signal.signal(signal.SIGHUP, signal.{}); run_workers(1, 'told', [])"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", program.format(handler)],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for handler in ("SIG_IGN", "SIG_DFL")
    ]
    assert said == ["SIG_IGN\n", "SIG_DFL\n"]


WORKER = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
ON_CPU = DEFAULTS.runtime.model_copy(update={"device": "cpu", "num_processes": 1})
TWO = ON_CPU.model_copy(update={"num_processes": 2})


@pytest.mark.parametrize(
    ("runtime", "environment", "line"),
    [
        (
            ON_CPU,
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "environment: ACCELERATE_GRADIENT_ACCUMULATION_STEPS is '4'; would change the training beside params.yaml; "
            "unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS, or launch with a file of configs/accelerate",
        ),
        (ON_CPU, {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, "unset ACCELERATE_DYNAMO_BACKEND"),
        (ON_CPU, {"ACCELERATE_USE_DEEPSPEED": "true"}, "unset ACCELERATE_USE_DEEPSPEED"),
        (ON_CPU, {"ACCELERATE_USE_FSDP": "true"}, "unset ACCELERATE_USE_FSDP"),
        (ON_CPU, {"ACCELERATE_TORCH_DEVICE": "cuda:7"}, "unset ACCELERATE_TORCH_DEVICE"),
        (ON_CPU, {"ACCELERATE_MIXED_PRECISION": "fp16"}, "unset ACCELERATE_MIXED_PRECISION"),
        (
            ON_CPU,
            {"WORLD_SIZE": "2"},
            "environment: WORLD_SIZE is set and RANK is not, so no launcher has set it; unset",
        ),
        (ON_CPU, {"WORLD_SIZE": "2", "RANK": "0"}, "unset RANK WORLD_SIZE"),
        (TWO, {"RANK": "0"}, "environment: RANK is set and WORLD_SIZE is not"),
        (ON_CPU, WORKER | {"RANK": "2"}, "environment: RANK is 2; must be < WORLD_SIZE (2); unset RANK"),
        (ON_CPU, WORKER | {"LOCAL_RANK": "x"}, "environment: LOCAL_RANK is 'x'; must be a whole number"),
        (
            TWO,
            WORKER | {"RANK": "0", "WORLD_SIZE": "1"},
            "runtime.num_processes is 2; must be 1, the processes that the",
        ),
        (
            ON_CPU,
            {"OMPI_COMM_WORLD_SIZE": "4"},
            "environment: OMPI_COMM_WORLD_SIZE is '4'; processes are not started by",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_a_launchers_variable_that_no_launcher_has_set_is_refused_by_name(runtime, environment, line):
    with pytest.raises(UserError) as caught:
        launch.check_environment(runtime, environment)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("runtime", "environment"),
    [
        (ON_CPU, {}),
        (ON_CPU, WORKER),
        (TWO, WORKER),
        (ON_CPU, {"PMI_SIZE": "1"}),
        (ON_CPU, {"ACCELERATE_USE_CPU": "True"}),
    ],
)
def test_what_launchers_set_is_taken(runtime, environment):
    launch.check_environment(runtime, environment)


def test_the_stage_refuses_before_anything_runs(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    done = run_stage(tmp_path, "--dry-run")
    assert done.returncode == 2
    assert done.stderr.startswith("environment: ACCELERATE_GRADIENT_ACCUMULATION_STEPS is '4'")
    assert len(done.stderr.splitlines()) == 1


def test_every_value_is_given_to_accelerate_whatever_the_environment_says(tmp_path, monkeypatch):
    for name, value in {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dsv3.training.setup.check_environment", lambda runtime: None)
    run = started_run(tmp_path)
    assert run.accelerator.gradient_accumulation_steps == 1
    assert run.accelerator.state.dynamo_plugin.backend == "NO"
    assert run.accelerator.mixed_precision == "no"
    assert run.forward is run.model

"""The train stage beside a server of Aim's that is killed: it ends, with everything written."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training_inputs import ROOT, environment, stage_command, warm_python, write_inputs

pytest.importorskip("aim", reason="Aim has no wheels for this Python")
from dsv3.tracking.aim import initialize

CALL_S = 3
"""Longest wait for an answer here, so that the test need not wait for the project's 20 s."""
BOUND_S = 60
MAX_STEPS = 100
IMPATIENT = (
    "import runpy, sys; from dsv3.tracking import tracker; "
    f"tracker.CALL_S = {CALL_S}.0; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """An `aim server` that answers, and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "server"
    folder.mkdir()
    initialize(str(folder))
    command = [str(Path(sys.executable).parent / "aim"), "server", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield process, port
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the server with what it has started; it may be dead."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_training_whose_aim_server_is_killed_ends_in_time_with_its_results_and_one_line(
    tmp_path: Path, server: tuple[subprocess.Popen[bytes], int]
):
    process, port = server
    runtime = {"trackers": ["aim"], "aim_repo": f"aim://127.0.0.1:{port}", "logging_steps": 1}
    write_inputs(tmp_path, train={"max_steps": MAX_STEPS, "eval_steps": MAX_STEPS}, runtime=runtime)
    command = [warm_python(), "-c", IMPATIENT, *stage_command(tmp_path)[2:]]
    training = subprocess.Popen(
        command, cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        history = tmp_path / "results" / "history.tsv"
        deadline = time.monotonic() + BOUND_S
        while not history.is_file() or len(history.read_text().splitlines()) < 6:
            assert training.poll() is None and time.monotonic() < deadline, training.communicate()
            time.sleep(0.01)
        kill(process)
        steps = len(history.read_text().splitlines()) - 1
        assert steps < MAX_STEPS, "the training was faster than its server's end"
        _, errors = training.communicate(timeout=BOUND_S)
    finally:
        training.kill()
    assert training.returncode == 0, errors
    (line,) = [line for line in errors.splitlines() if "tracker aim failed" in line]
    assert "the run goes on, results/ are complete" in line
    assert "Traceback" not in errors
    assert len(history.read_text().splitlines()) == MAX_STEPS + 1
    assert (tmp_path / "results" / "metrics.json").is_file()
    assert (tmp_path / "final_model" / "model.safetensors").is_file()

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.training.lock import hold_lock
from tests.training_inputs import ROOT

HOLD = """
import os, sys, time
from pathlib import Path
from dsv3.errors import UserError
from dsv3.training.lock import hold_lock
directory, mark = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
try:
    with hold_lock(directory):
        if mark == "forks" and os.fork() == 0:
            time.sleep(60)
        print("won", os.getpid(), flush=True)
        sys.stdin.readline()
except UserError as error:
    print("lost", error, flush=True)
"""


def start(directory: Path, mark: str = "") -> subprocess.Popen[str]:
    """A process that is ready to take the lock of `directory` on the next line that it is sent."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), mark],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert read(process) == "ready"
    return process


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def leave_a_stale_lock(directory: Path) -> int:
    """Let a process die that holds the lock; return its number."""
    process = start(directory)
    tell(process)
    assert read(process).startswith("won")
    process.kill()
    process.communicate()
    locks = sorted(path.name for path in (directory.parent / "locks").iterdir())
    assert locks == [f"{directory.name}.holder", f"{directory.name}.lock"]
    return process.pid


@pytest.mark.parametrize("attempt", range(3))
def test_of_eight_that_find_a_stale_lock_at_once_exactly_one_wins(tmp_path, attempt):
    directory = tmp_path / "run"
    leave_a_stale_lock(directory)
    processes = [start(directory) for _ in range(8)]
    for process in processes:
        tell(process)
    answers = [read(process) for process in processes]
    for process in processes:
        process.communicate("\n")
    assert sorted(answer.split()[0] for answer in answers) == ["lost"] * 7 + ["won"], answers


def test_the_one_who_comes_second_is_told_in_one_line_who_was_first(tmp_path):
    with (
        hold_lock(tmp_path / "run"),
        pytest.raises(UserError, match=f"process and host {os.getpid()} {socket.gethostname()}\\)") as refused,
        hold_lock(tmp_path / "run"),
    ):
        pass
    assert "\n" not in str(refused.value)
    assert str(tmp_path / "run") in str(refused.value)


def test_a_lock_that_was_let_go_can_be_taken_again_and_stays_as_an_empty_file(tmp_path):
    for _ in range(2):
        with hold_lock(tmp_path / "run"):
            pass
    (left,) = (tmp_path / "locks").iterdir()
    assert left.name == "run.lock" and left.stat().st_size == 0


def test_a_pipe_in_the_place_of_a_lock_is_told_in_one_line(tmp_path):
    (tmp_path / "locks").mkdir()
    os.mkfifo(tmp_path / "locks" / "run.lock")
    told = r"run\.lock: is no regular file, so it can't be locked; remove it$"
    with pytest.raises(UserError, match=told), hold_lock(tmp_path / "run"):
        pass


def test_a_dead_process_is_no_obstacle_and_is_not_named(tmp_path):
    dead = leave_a_stale_lock(tmp_path / "run")
    with hold_lock(tmp_path / "run"):
        assert not (tmp_path / "locks" / "run.holder").read_text().startswith(f"{dead} ")


def test_a_process_forked_by_the_holder_does_not_keep_the_lock_when_the_holder_dies(tmp_path):
    process = start(tmp_path / "run", "forks")
    try:
        tell(process)
        assert read(process).startswith("won")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.1)
        with hold_lock(tmp_path / "run"):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the forked one
        process.communicate()

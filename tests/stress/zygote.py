"""A process that has imported torch once and forks what is to run: a training begins in milliseconds, not seconds.

A child is a process of its own in a session of its own, which ends as any Python does: exit handlers, threads, status.
It reads requests, a line of JSON each: start a module, or wait for a process.
"""

import faulthandler
import functools
import gc
import json
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOADED = ("dsv3.training.session", "dsv3.training.launch", "dsv3.generation.sampling", "dsv3.export.loading")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink"}
"""Audit events of Python that change a file system, beside `open` for writing."""
BALLAST = "ballast"
"""The file that fills a small disk."""


def digest_code_once() -> None:
    """Let all children share the digests of the code, which take a third of a small training's time."""
    from dsv3.training import setup

    setup.dependencies = functools.cache(setup.dependencies)
    digests = setup.syntax_digests(setup.dependencies("train"))
    setup.syntax_digests = lambda names: digests


def serve() -> dict[str, Any]:
    """Answer requests; return, in the child, the one that it is to do."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            answer = {"status": status_within(request["wait"], request["timeout"])}
        else:
            pid = os.fork()
            if pid == 0:
                return request
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    raise SystemExit


def status_within(pid: int, timeout: float) -> int | None:
    """The exit status of a child, negative for a signal; None where it still runs after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def become(job: dict[str, Any]) -> None:
    """Take the environment, the arguments and the output of the job."""
    os.setsid()
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    for path, flags, numbers in (
        (os.devnull, os.O_RDONLY, (0,)),
        (job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, (1, 2)),
    ):
        file = os.open(path, flags)
        for number in numbers:
            os.dup2(file, number)
        os.close(file)
    sys.argv = [job["module"], *job["arguments"]]
    root = Path(job["environment"]["DVC_ROOT"])
    if job["crash_at"]:
        before_change(job["crash_at"], root, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if job["full_at"]:
        before_change(job["full_at"], root, lambda: fill(root))


def fill(disk: Path) -> None:
    """Take all space that is free on a small disk, by the file that its user removes later."""
    with (disk / BALLAST).open("wb") as file:
        while free := shutil.disk_usage(disk).free:
            os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free)


def before_change(number: int, root: Path, act: Callable[[], None]) -> None:
    """Call `act` before the event of that number, counted from 1, that changes something below `root`."""
    left, below = number, f"{root}{os.sep}"

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        is_change = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES)
        if is_change and isinstance(arguments[0], (str, Path)) and str(arguments[0]).startswith(below):
            left -= 1
            if not left:
                act()

    sys.addaudithook(count)


if __name__ == "__main__":
    for name in (*PRELOADED, *sys.argv[1:]):
        __import__(name)
    digest_code_once()
    gc.freeze()  # or each child's collector copies it all as the child ends, which takes longer than a training
    assigned = serve()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # of a proof under nohup; a training would heed that
    faulthandler.register(signal.SIGUSR1)  # says where each thread is
    become(assigned)
    runpy.run_module(assigned["module"], run_name="__main__", alter_sys=True)

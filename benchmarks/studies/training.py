"""Runs a study's trainings: DVC experiments in folders of their own, several at a time.

DVC stashes the workspace when an experiment starts, and two that do so at once disturb each other; so the next one
starts when the one before has reached its first stage. Children are sessions of their own: a Ctrl-C reaches only this
process, which passes it on once. A training then saves its state, and the same command goes on from there.
"""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from dsv3.errors import Interrupted, UserError

LOGS = Path(".dvc/tmp/studies")
STARTED = ("Running stage", "is cached", "didn't change")
"""What DVC writes once it has left the workspace."""
POLL_S = 0.5


def experiments() -> set[str]:
    """Return the names of the experiments that DVC holds for the checked-out commit; `UserError` without DVC."""
    if shutil.which("dvc") is None:
        raise UserError("dvc is not on the PATH; run: source .venv/bin/activate")
    listed = subprocess.run(["dvc", "exp", "list", "--names-only"], capture_output=True, text=True, check=False)
    if listed.returncode:
        raise UserError(f"dvc exp list: {listed.stderr.strip()}")
    return set(listed.stdout.split())


def train(jobs: Mapping[str, list[str]], num_at_once: int, num_threads: int, message: str) -> None:
    """Run each job (name to flags), `num_at_once` at a time, and print a line when one ends.

    Raises `Interrupted` after Ctrl-C or SIGTERM, once every training has saved its state, and `UserError` when runs
    failed.
    """
    runner = Runner(num_threads, message)
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(num_at_once) as pool:
            futures = [pool.submit(runner.run, name, flags) for name, flags in jobs.items()]
            try:
                wait(futures)
            except KeyboardInterrupt:
                runner.stop()
                wait(futures)
                raise Interrupted("interrupted; the same command goes on from here", 128 + signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGTERM, handler)
    failed = [name for name, future in zip(jobs, futures, strict=True) if future.result() != 0]
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}; see {LOGS}/")


class Runner:
    """Runs one experiment per thread."""

    def __init__(self, num_threads: int, message: str) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        self._message = message
        self._starting = threading.Lock()
        self._children: list[subprocess.Popen[bytes]] = []
        self._is_stopping = False
        LOGS.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, flags: list[str]) -> int | None:
        """Run one experiment to its end; return its exit status, None if it was never started."""
        start, path = time.monotonic(), LOGS / f"{name}.log"
        command = ["dvc", "exp", "run", "--temp", "--name", name, "--message", self._message, *flags]
        with self._starting, path.open("wb") as log:
            if self._is_stopping:
                return None
            child = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
            self._children.append(child)
            until(lambda: child.poll() is not None or self._is_stopping or says(path, STARTED))
        status = child.wait()
        outcome = "done" if status == 0 else "stopped" if self._is_stopping else f"failed ({status}), see {path}"
        print(f"{time.strftime('%H:%M:%S')} {name} {outcome}, {time.monotonic() - start:.0f} s", flush=True)
        return status

    def stop(self) -> None:
        """Start nothing more, and interrupt what runs."""
        self._is_stopping = True  # ends the wait of the run that is starting, which then gives the lock away
        with self._starting:
            for child in self._children:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGINT)


def until(is_true: Callable[[], bool]) -> None:
    """Return as soon as `is_true` says so."""
    while not is_true():
        time.sleep(POLL_S)


def says(path: Path, phrases: Iterable[str]) -> bool:
    """Return whether the log contains one of the phrases."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return any(phrase in text for phrase in phrases)

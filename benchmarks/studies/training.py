"""Runs a study's trainings: DVC experiments in folders of their own, several at a time.

DVC stashes the workspace when an experiment starts, and two that do so at once disturb each other; so the next one
starts when the one before has reached its first stage. Children are sessions of their own: a Ctrl-C reaches only this
process, which passes it on once. A training then saves its state, and the same command goes on from there.

A run that has teachers waits for them, and those behind it go first. DVC keeps the model of every experiment in its
cache; the teachers' are copied from there, each into a folder of its own.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from dsv3.errors import Interrupted, UserError

LOGS = Path(".dvc/tmp/studies")
MODELS = LOGS / "models"
"""Copies of the teachers, by run and commit."""
MODEL = "outputs/final_model"
STARTED = ("Running stage", "is cached", "didn't change")
"""What DVC writes once it has left the workspace."""
POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """One run: the arguments of `dvc exp run`, and the runs whose models teach it."""

    flags: list[str]
    teachers: list[str] = field(default_factory=list)


def experiments() -> set[str]:
    """Return the names of the experiments that DVC holds for the checked-out commit; `UserError` without DVC."""
    if shutil.which("dvc") is None:
        raise UserError("dvc is not on the PATH; run: source .venv/bin/activate")
    listed = subprocess.run(["dvc", "exp", "list", "--names-only"], capture_output=True, text=True, check=False)
    if listed.returncode:
        raise UserError(f"dvc exp list: {listed.stderr.strip()}")
    return set(listed.stdout.split())


def train(jobs: Mapping[str, Job], num_at_once: int, num_threads: int, message: str) -> None:
    """Run each job, `num_at_once` at a time, none before its teachers, and print a line when one ends.

    Raises `Interrupted` after Ctrl-C or SIGTERM, once every training has saved its state, and `UserError` when runs
    failed or had no teachers.
    """
    runner = Runner(num_threads, message)
    waiting, failed = dict(jobs), list[str]()
    running: dict[Future[int | None], str] = {}
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(num_at_once) as pool:
            try:
                while waiting or running:
                    for name in ready(waiting, {*waiting, *running.values(), *failed})[: num_at_once - len(running)]:
                        running[pool.submit(runner.run, name, waiting.pop(name))] = name
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        name = running.pop(future)
                        failed += [name] if future.result() != 0 else []
            except KeyboardInterrupt:
                runner.stop()
                wait(running)
                raise Interrupted("interrupted; the same command goes on from here", 128 + signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGTERM, handler)
    if failed:
        without = f"; not begun without them: {', '.join(waiting)}" if waiting else ""
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}{without}; see {LOGS}/")


def ready(waiting: Mapping[str, Job], unfinished: Set[str]) -> list[str]:
    """Return the names of the jobs none of whose teachers is unfinished."""
    return [name for name, job in waiting.items() if unfinished.isdisjoint(job.teachers)]


class Runner:
    """Runs one experiment per thread."""

    def __init__(self, num_threads: int, message: str) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        self._message = message
        self._starting = threading.Lock()
        self._children: list[subprocess.Popen[bytes]] = []
        self._is_stopping = False
        LOGS.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, job: Job) -> int | None:
        """Run one experiment to its end; return its exit status, None if it was never started."""
        start, path = time.monotonic(), LOGS / f"{name}.log"
        command = ["dvc", "exp", "run", "--temp", "--name", name, "--message", self._message, *job.flags]
        with self._starting, path.open("wb") as log:
            if self._is_stopping:
                return None
            if job.teachers:
                models = [kept_model(teacher, log) for teacher in job.teachers]
                if None in models:
                    print(f"{time.strftime('%H:%M:%S')} {name} has no teachers, see {path}", flush=True)
                    return 1
                command += ["-S", f"train.teachers=[{','.join(map(str, models))}]"]
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


def kept_model(run: str, log: IO[bytes]) -> Path | None:
    """Return the folder with the model of a finished run, copied from DVC's cache if it is not there yet.

    None where DVC can't, which says why in `log`.
    """
    head = _git("rev-parse", "HEAD")
    commit = _git("rev-parse", "--verify", "--quiet", f"refs/exps/{head[:2]}/{head[2:]}/{run}")
    if not commit:  # without one, DVC would copy the workspace's model
        log.write(f"{run} is no experiment of the checked-out commit\n".encode())
        return None
    folder = MODELS / f"{run}-{commit[:12]}"
    if not folder.is_dir():
        MODELS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=MODELS) as place:
            command = ["dvc", "get", ".", MODEL, "--rev", commit, "--out", f"{place}/model"]
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
                return None
            (Path(place) / "model").replace(folder)
    return folder


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def until(is_true: Callable[[], bool]) -> None:
    """Return as soon as `is_true` says so."""
    while not is_true():
        time.sleep(POLL_S)


def says(path: Path, phrases: Iterable[str]) -> bool:
    """Return whether the log contains one of the phrases."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return any(phrase in text for phrase in phrases)

"""Experiments of DVC, several at once, beside Aim's interface."""

import os
import random
import re
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path

from tests.pipeline.laboratory import Laboratory
from tests.stress.processes import Failure, wait_until
from tests.stress.trainings import Trainings
from tests.stress.trials import Outcome

QUEUED = {"q1": "train.optim=adamw", "q2": "train.learning_rate=0.02", "q3": "seed=7", "q4": "train.use_fp8=true"}
TEMPORARY = {"t1": "train.learning_rate=0.005", "t2": "seed=11"}
TIMEOUT_S = 1500.0


def at_once(trainings: Trainings, draw: random.Random) -> Outcome:
    """Run four queued experiments, two at a time, and two temporary ones, while `aim up` serves; all must complete."""
    del draw
    lab = Laboratory.at(trainings.root / "laboratory")
    lab.run("dvc", "repro", timeout=TIMEOUT_S)
    lab.commit("Results")
    for name, change in QUEUED.items():
        lab.run("dvc", "exp", "run", "--queue", "--name", name, "--set-param", change)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    interface = lab.start(sys.executable, "-m", "dsv3.tracking.views", "--port", str(port))
    try:
        if not wait_until(lambda: answers(port)):
            raise Failure("Aim's interface does not answer")
        lab.run("dvc", "queue", "start", "--jobs", "2")
        others = []
        for name, change in TEMPORARY.items():
            others.append(lab.start("dvc", "exp", "run", "--temp", "--name", name, "--set-param", change))
            time.sleep(5.0)  # DVC stashes the workspace; two that do so at once disturb each other
        for process in others:
            _, errors = process.communicate(timeout=TIMEOUT_S)
            if process.returncode:
                raise Failure(f"a temporary experiment ended with {process.returncode}\n{errors}")
        wait_until(lambda: not re.search("Queued|Running", lab.run("dvc", "queue", "status").stdout), TIMEOUT_S)
        check_all_are_there(lab, trainings.root)
        if not answers(port):
            raise Failure("Aim's interface has died")
    finally:
        os.killpg(interface.pid, signal.SIGTERM)  # Aim's server is a child, which outlives it
        interface.communicate(timeout=60)
    return Outcome(len(QUEUED) + len(TEMPORARY))


def answers(port: int) -> bool:
    """Whether Aim's interface answers there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/projects/", timeout=5) as page:
            return page.status == 200
    except OSError:
        return False


def check_all_are_there(lab: Laboratory, scratch: Path) -> None:
    """Raise `Failure` unless DVC and Aim have each experiment, whole."""
    found = set(lab.run("dvc", "exp", "list", "--names-only").stdout.split())
    if found != {*QUEUED, *TEMPORARY}:
        raise Failure(f"DVC has {sorted(found)}\n{lab.run('dvc', 'queue', 'status').stdout}")
    runs = lab.aim_runs(scratch)
    lost = [name for name in found if runs.get(name, {}).get("status") != "finished"]
    if lost:
        raise Failure(f"Aim has no finished run of {lost}")

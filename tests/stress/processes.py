"""Processes that are started, disturbed and waited for; what must never happen to one is a `Failure`."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.training_inputs import ROOT

HANG_S = 120.0
"""No training here takes as long; on a busy machine it takes seconds."""


class Failure(Exception):
    """A traceback, a hang, a silent difference."""


@dataclass
class Process:
    """A process of the zygote's."""

    zygote: "Zygote"
    pid: int
    output: Path
    _status: int | None = None

    def status(self, timeout: float = 0.0) -> int | None:
        """The exit status, negative for a signal; None where it still runs after `timeout` seconds."""
        if self._status is None:
            self._status = self.zygote.ask({"wait": self.pid, "timeout": timeout})["status"]
        return self._status

    def send(self, number: int) -> None:
        """Send a signal to it and to all that it has started; to nobody where it has ended."""
        if self.status() is not None:
            return
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it has not yet a session of its own
            os.kill(self.pid, number)

    def ended(self, timeout: float = HANG_S) -> tuple[int, str]:
        """Its exit status and what it has written, once it has ended; a hang or a traceback is a failure."""
        status = self.status(timeout)
        if status is None:
            self.send(signal.SIGUSR1)  # it says where it is
            self.status(2.0)
            self.send(signal.SIGKILL)
            self.status(10.0)
            raise Failure(f"still runs after {timeout:.0f} s\n{self.text()}")
        text = self.text()
        if "Traceback" in text or status == 1:
            raise Failure(f"status {status}\n{text}")
        return status, text

    def finished(self) -> str:
        """What it has written, once it has ended well."""
        status, text = self.ended()
        if status:
            raise Failure(f"status {status}\n{text}")
        return text

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


class Zygote:
    """The client of tests/stress/zygote.py."""

    def __init__(self) -> None:
        trackers = ["dsv3.tracking.aim"] if importlib.util.find_spec("aim") else []
        self._served = subprocess.Popen(
            [sys.executable, "-m", "tests.stress.zygote", *trackers],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._num_started = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._served.stdin is not None and self._served.stdout is not None
        self._served.stdin.write(json.dumps(request) + "\n")
        self._served.stdin.flush()
        return json.loads(self._served.stdout.readline())

    def start(
        self, module: str, arguments: list[str], root: Path, crash_at: int = 0, full_at: int = 0, **variables: str
    ) -> Process:
        """Start `python -m module arguments` with its DVC root at `root`.

        Before change `crash_at` of the file system it is killed, before change `full_at` the disk is filled.
        """
        self._num_started += 1
        output = root.parent / f"{root.name}.{self._num_started}.log"
        output.touch()
        job = {
            "module": module,
            "arguments": arguments,
            "environment": {**environment(), "DVC_ROOT": str(root), **variables},
            "folder": str(ROOT),
            "output": str(output),
            "crash_at": crash_at,
            "full_at": full_at,
        }
        return Process(self, self.ask(job)["pid"], output)

    def close(self) -> None:
        assert self._served.stdin is not None
        self._served.stdin.close()
        self._served.wait()


def environment() -> dict[str, str]:
    """One thread, for equal rounding; no network; nothing of a DVC that may have started this."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    own = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return {**inherited, **own, "GOMP_SPINCOUNT": "10000", "MPLBACKEND": "Agg", "DVC_NO_ANALYTICS": "1"}


def wait_until(is_true: Any, timeout: float = HANG_S) -> bool:
    """Return whether it became true within the time."""
    end = time.monotonic() + timeout
    while not is_true():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True

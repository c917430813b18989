"""Every test starts from the same state: fixed seeds, deterministic algorithms, no network, one thread, no home, and
nothing of what a run or an experiment left in the working tree.
"""

import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Read when torch, tokenizers, huggingface_hub and matplotlib are imported, so set before any of them.
HOME = tempfile.TemporaryDirectory(prefix="dsv3-tests-")
os.environ |= {
    "OMP_NUM_THREADS": "1",  # the workers of pytest share the cores
    "TOKENIZERS_PARALLELISM": "false",  # or tokenizers warns about every fork that follows
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": HOME.name,  # remote code is copied there; yours stays as it is
    "MPLBACKEND": "Agg",
    "DVC_NO_ANALYTICS": "1",
}
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a training under nohup does not hear it; tests under nohup are to
for name in [name for name in os.environ if name in {"DVC_ROOT", "DVC_STAGE"} or name.startswith("DVC_EXP_")]:
    del os.environ[name]  # a test run started by DVC must not write into that run

from tests import committed  # noqa: E402 -- with the variables above, and with Git's own, which a hook sets

sys.addaudithook(committed.refuse_what_runs_write)

# Repositories that tests make are not those of a Git hook's variables, and have no settings of yours.
for name in [name for name in os.environ if name.startswith("GIT_")]:
    del os.environ[name]
SETTINGS = Path(HOME.name) / "gitconfig"
SETTINGS.write_text("[safe]\n\tdirectory = *\n", encoding="utf-8")
os.environ |= {"GIT_CONFIG_GLOBAL": str(SETTINGS), "GIT_CONFIG_NOSYSTEM": "1"}

# A shell that starts pytest in the background lets it, and all that it starts, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same commit gets the same verdict, whatever the machine's speed.
settings.register_profile("same verdict", deadline=None, derandomize=True)
settings.load_profile("same verdict")


class NeverSet(threading.Event):
    """An event that stays as it is."""

    def set(self) -> None:
        pass


LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True)
def same_start() -> None:
    """Seed what draws random numbers, and let torch refuse operations that are not deterministic."""
    import random

    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True, scope="session")
def own_end() -> Iterator[None]:
    """Let no command that runs in this process end it: a tracker that failed in an earlier test would ask for that."""
    from dsv3 import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_skips_shutdown", NeverSet())
        yield


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse connections that leave this machine: a test that needs the network tests the network."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "127."
        assert str(host).startswith(LOOPBACK), f"a test tried to reach {host}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield


def pytest_xdist_auto_num_workers() -> int:
    """One more than cores, for some tests wait for processes; few: each worker imports torch and holds its models."""
    return min(4, (os.cpu_count() or 1) + 1)


LONG_FILES = (
    "tests/pipeline/",
    "tests/stages/test_train",
    "tests/dsv3/training/test_sharding",
    "tests/dsv3/kernels/test_triton",
    "tests/gpu_model/",
    "tests/dsv3/sizing/test_processes",
)
"""How the names of the longest files begin, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first, so that no worker waits for one at the end."""

    def place(item: pytest.Item) -> int:
        return next((n for n, name in enumerate(LONG_FILES) if item.nodeid.startswith(name)), len(LONG_FILES))

    items.sort(key=place)

"""Several training processes on one machine, started by torch's elastic agent from within the stage.

`accelerate launch` returns before its child has saved, and starts a single process where it was asked for two CPU
ones. The agent below waits for its workers after a signal, passes it on, and reports how they ended.
"""

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SHUTDOWN_S = 600
"""Longest wait for workers that were told to stop: they finish a step and save."""


def is_worker() -> bool:
    """Return whether a launcher (this one, torchrun, accelerate) has started this process as one of several."""
    return "RANK" in os.environ


def run_workers(num_processes: int, module: str, arguments: Sequence[str]) -> None:
    """Run `python -m module arguments` in `num_processes` processes and wait; end this one where they failed.

    Raises `SystemExit` with the first failed worker's status, which has told its reason itself.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=SHUTDOWN_S,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None
    except ChildFailedError as failed:
        # In the order in which they were noticed: the others were only told to stop, because of the first.
        status = next(iter(failed.failures.values())).exitcode
        raise SystemExit(status if status > 0 else 128 - status) from None

"""Several training processes on one machine, and the variables by which launchers describe them.

They are started by torch's elastic agent from within the stage.

`accelerate launch` returns before its child has saved, and starts a single process where it was asked for two CPU
ones. The agent below waits for its workers after a signal, passes it on, and reports how they ended.

Accelerate and torch read variables that a launcher sets for its workers. Left in a shell, they would change a training
silently, under the same fingerprint; so everything that is not as a launcher sets it is refused.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dsv3.errors import LOST_PROCESS_STATUS, UserError
from dsv3.params.read import Params
from dsv3.params.runtime import RuntimeParams

logger = logging.getLogger(__name__)

SHUTDOWN_S = 600
"""Longest wait for workers that were told to stop: they finish a step and save."""


KILLED_BY_AGENT_S = 20
"""torch's agent gives the other workers 30 s after a failure, and then kills them: that is no failure of their own."""

WORKER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
"""What torch's elastic agent (this module's, torchrun's, accelerate launch's) sets for each worker: all, or none."""

MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""From these Accelerate takes the number of processes on a CPU."""

ACCELERATE_PREFIX = "ACCELERATE_"

HARMLESS: Mapping[str, tuple[str, ...]] = {
    "ACCELERATE_MIXED_PRECISION": ("no", "bf16"),  # configs/accelerate; train.precision decides
    "ACCELERATE_USE_CPU": ("false", "0"),
    "ACCELERATE_DYNAMO_BACKEND": ("no",),
    "ACCELERATE_DYNAMO_MODE": ("default",),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": ("false", "0"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": ("false", "0"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": ("false", "0"),
    "ACCELERATE_CPU_AFFINITY": ("false", "0", "true", "1"),  # pins processes to cores
    "ACCELERATE_DEBUG_MODE": ("false", "0", "true", "1"),  # checks shapes before collectives
}
"""What accelerate launch sets for a training that configs/accelerate describes, in small letters."""


def check_environment(runtime: RuntimeParams, environment: Mapping[str, str] = os.environ) -> None:
    """Raise `UserError` for a launcher's variable that no launcher has set so and that would change the training."""
    _check_accelerate(runtime, environment)
    missing = [name for name in WORKER_VARIABLES if name not in environment]
    present = [name for name in WORKER_VARIABLES if name in environment]
    if not present:
        _check_mpi(environment)
        return
    if missing:
        raise UserError(
            f"environment: {present[0]} is set and {missing[0]} is not, so no launcher has set it; "
            f"unset {' '.join(present)}"
        )
    _check_ranks(runtime, environment)


def _check_accelerate(runtime: RuntimeParams, environment: Mapping[str, str]) -> None:
    """Raise `UserError` for a setting of Accelerate that params.yaml does not know of."""
    for name in sorted(name for name in environment if name.startswith(ACCELERATE_PREFIX)):
        value, harmless = environment[name], HARMLESS.get(name, ())
        if name == "ACCELERATE_USE_CPU" and runtime.device_type(torch.cuda.is_available()) == "cpu":
            harmless = (*harmless, "true", "1")
        if value.lower() not in harmless:
            raise UserError(
                f"environment: {name} is {value!r}; would change the training beside params.yaml; unset {name}, "
                "or launch with a file of configs/accelerate"
            )


def _check_mpi(environment: Mapping[str, str]) -> None:
    """Raise `UserError` where MPI has started this process as one of several, which would all train the same."""
    for name in MPI_SIZES:
        value = environment.get(name, "1")
        if value != "1":
            raise UserError(
                f"environment: {name} is {value!r}; processes are not started by MPI; unset {name}, "
                "and use torchrun or runtime.num_processes"
            )


def _check_ranks(runtime: RuntimeParams, environment: Mapping[str, str]) -> None:
    """Raise `UserError` where a worker's numbers contradict each other or runtime.num_processes."""
    for number, count in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        for name in (number, count):
            if not environment[name].isdecimal():
                raise UserError(f"environment: {name} is {environment[name]!r}; must be a whole number; unset {name}")
        if int(environment[number]) >= int(environment[count]):
            raise UserError(
                f"environment: {number} is {environment[number]}; must be < {count} ({environment[count]}); "
                f"unset {' '.join(WORKER_VARIABLES)}"
            )
    started = int(environment["WORLD_SIZE"])
    allowed = "1" if started == 1 else f"1 or {started}"
    if runtime.num_processes not in (1, started):
        raise UserError(
            f"params.yaml: runtime.num_processes is {runtime.num_processes}; must be {allowed}, the processes "
            f"that the launcher has started (or unset {' '.join(WORKER_VARIABLES)})"
        )


def check_sharding(params: Params, world_size: int, n_routed_experts: int) -> None:
    """Raise `UserError` where the parameters ask for a sharding that `world_size` processes can't have."""
    runtime = params.runtime
    if runtime.sharding == "none":
        for name, needs in {
            "cpu_offload": runtime.cpu_offload == "parameters",
            "expert_parallel": runtime.expert_parallel > 1,
            "async_save": runtime.async_save,
        }.items():
            if needs:
                value = str(getattr(runtime, name)).lower()
                raise UserError(f"params.yaml: runtime.{name} is {value}; needs runtime.sharding full")
        return
    if runtime.cpu_offload == "optimizer":
        raise UserError(
            f"params.yaml: runtime.cpu_offload is optimizer; needs runtime.sharding none ({runtime.sharding} here); "
            "set it to parameters, which offloads the moments' shards too"
        )
    if world_size == 1:
        raise UserError(
            f"params.yaml: runtime.sharding is {runtime.sharding}; there is one process and nothing to share; raise "
            "runtime.num_processes, or set it to none"
        )
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if runtime.sharding == "hybrid" and (per_machine == 1 or world_size == per_machine or world_size % per_machine):
        raise UserError(
            f"params.yaml: runtime.sharding is hybrid; needs several machines with equally many processes, at least 2 "
            f"each ({world_size} processes, {per_machine} on this machine); set it to full"
        )
    if runtime.expert_parallel > 1:
        check_expert_parallel(params, world_size, n_routed_experts)


def check_expert_parallel(params: Params, world_size: int, n_routed_experts: int) -> None:
    """Raise `UserError` where the experts can't be shared by `runtime.expert_parallel` processes."""
    runtime, num_processes = params.runtime, params.runtime.expert_parallel
    where = f"params.yaml: runtime.expert_parallel is {num_processes}"
    if world_size % num_processes or n_routed_experts % num_processes:
        raise UserError(
            f"{where}; must divide the {world_size} processes and the architecture's {n_routed_experts} experts"
        )
    excluded = {
        "runtime.sharding": runtime.sharding != "full",
        "runtime.cpu_offload": runtime.cpu_offload != "none",
        "train.torch_compile": params.train.torch_compile,
    }
    for name, is_set in excluded.items():
        if is_set:
            raise UserError(f"{where}; not together with {name} as it is set; set one of the two back")


def first_status(failures: Sequence[ProcessFailure]) -> int:
    """Return the exit status of the worker that failed first, from `failures` in the order in which they were noticed.

    The others were told to stop because of it, or missed it; one that was stopped (SIGSTOP) or hung was missed, did not
    stop when it was told to, and was killed by the agent in the end.
    """
    first_at = failures[0].timestamp
    own = [failure for failure in failures if failure.timestamp < first_at + KILLED_BY_AGENT_S]
    return next((each.exitcode for each in own if each.exitcode != LOST_PROCESS_STATUS), LOST_PROCESS_STATUS)


def is_worker() -> bool:
    """Return whether a launcher (this one, torchrun, accelerate) has started this process as one of several."""
    return "RANK" in os.environ


def run_workers(num_processes: int, module: str, arguments: Sequence[str]) -> None:
    """Run `python -m module arguments` in `num_processes` processes and wait; end this one where they failed.

    Raises `SystemExit` with the first failed worker's status, which has printed its reason itself.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    # Under nohup SIGHUP is ignored; torch would handle it, and end the workers.
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=SHUTDOWN_S,
        signals_to_handle="SIGTERM,SIGINT,SIGQUIT" if is_nohup else "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None
    except ChildFailedError as failed:
        status = first_status(list(failed.failures.values()))
        if status == -signal.SIGKILL:
            logger.error(
                "a process was killed (SIGKILL), as systems do when memory runs out; dvc repro goes on from the last "
                "checkpoint; lower train.per_device_train_batch_size or set train.gradient_checkpointing"
            )
        raise SystemExit(status if status > 0 else 128 - status) from None

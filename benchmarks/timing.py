"""Interleaved timing, and the conditions without which a number means nothing.

On a GPU time is taken by its own events, and its second-level cache is overwritten before each measurement: a tensor
that the previous contestant left there would be read at several times the speed of memory.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv3.artifacts import check_replaceable_file

Functions = Mapping[str, Callable[[], object]]


def medians_s(functions: Functions, rounds: int, device: torch.device) -> dict[str, float]:
    """Return the median time of each function in seconds, over the rounds of `paired_s`."""
    return {name: statistics.median(values) for name, values in paired_s(functions, rounds, device).items()}


def paired_s(functions: Functions, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the times of each function in seconds, a value per round.

    Every round times each function once, in an order that rotates, so that a disturbance of the machine strikes all of
    them alike. Each is called once more just before, untimed: it would else pay for what the one before it left behind
    (freed memory that the allocator gives back to the system at the next occasion, which doubled a time).
    """
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    evict = cache_eviction(device)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            functions[name]()
            times[name].append(elapsed_s(functions[name], device, evict))
    return times


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios round by round, which a drift of the machine's speed does not move."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


@dataclass(frozen=True)
class Cost:
    """What a whole process took, its own children among it."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    """Resident memory of the largest single process."""


LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
wall_s, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
sys.stderr.buffer.write(done.stderr)
print(json.dumps([done.returncode, wall_s, used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""
"""A small process between: a child's peak of memory is at least what its parent holds when it starts it."""


def process_cost(command: Sequence[str], folder: Path | None = None) -> Cost:
    """Run a command to its end in `folder`, by default the working directory; raise `RuntimeError` where it fails."""
    launched = [sys.executable, "-c", LAUNCHER, *command]
    done = subprocess.run(launched, cwd=folder, capture_output=True, text=True, check=True)
    returncode, wall_s, cpu_s, peak = json.loads(done.stdout)
    if returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {returncode}: {done.stderr[-2000:]}")
    return Cost(wall_s, cpu_s, peak if sys.platform == "darwin" else peak * 1024)


def elapsed_s(function: Callable[[], object], device: torch.device, evict: Callable[[], object]) -> float:
    """Return the time that one call takes after `evict`, in seconds.

    On a GPU nothing waits between the two, so that the call's kernels are launched while the eviction still runs: the
    kernels are timed, not the host.
    """
    synchronize(device)
    evict()
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    function()
    events[1].record()
    synchronize(device)
    return events[0].elapsed_time(events[1]) / 1e3


def cache_eviction(device: torch.device) -> Callable[[], object]:
    """Return a function that overwrites a GPU's second-level cache; on a CPU it does nothing."""
    if device.type != "cuda":
        return lambda: None
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(4 * cache_bytes, dtype=torch.uint8, device=device).zero_


def best_device(name: str) -> torch.device:
    """Return the device of that name; auto is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU is done when it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_json(path: Path | None) -> None:
    """Raise `UserError`, before anything is measured, where the file to be written is there and no benchmark's."""
    if path is not None:
        check_replaceable_file(path, re.compile(rb'\{\s*"conditions": '), "benchmark's results")


def conditions(device: torch.device) -> dict[str, Any]:
    """Return what a measurement depends on besides its shapes: hardware, threads, versions, commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "load_average": round(os.getloadavg()[0], 1),  # above the number of cores, distrust the times
    }


def processor() -> str:
    """Return the processor's name and its widest vector instructions."""
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {capability}"

"""Interleaved timing, and the conditions without which a number means nothing."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Functions = Mapping[str, Callable[[], object]]


def medians_s(functions: Functions, rounds: int, device: torch.device) -> dict[str, float]:
    """Return the median time of each function in seconds.

    Every round calls each function once, in an order that rotates, so that a disturbance of the machine strikes all of
    them alike and no function always follows the same one.
    """
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        functions[name]()
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize(device)
            start = time.perf_counter()
            functions[name]()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU is done when it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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

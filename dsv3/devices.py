"""The device that a stage runs on, and what it multiplies natively."""

from pathlib import Path

import psutil
import torch

from dsv3.errors import UserError
from dsv3.params.runtime import RuntimeParams

FP8_CAPABILITY = (8, 9)
"""Ada and Hopper multiply e4m3; Triton refuses to compile it for anything older."""
BF16_CAPABILITY = (8, 0)
"""Ampere."""


def torch_device(runtime: RuntimeParams) -> torch.device:
    """Return the device that `runtime.device` means here; raise `UserError` for cuda where there is none."""
    device_type = runtime.device_type(has_cuda=torch.cuda.is_available())
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("params.yaml: runtime.device is cuda; this machine has no CUDA device; set it to auto or cpu")
    return torch.device(device_type)


def device_name(device: torch.device) -> str:
    """Return the device as results name it: the GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def free_bytes(device: torch.device) -> int:
    """Return the memory that a process may still take on `device`; on a CPU at most what a container leaves it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _container_bytes(Path("/sys/fs/cgroup")))


def total_bytes(device: torch.device) -> int:
    """Return the memory of `device`, whoever has taken of it; on a CPU at most what a container may have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limit, _ = _container_limit(Path("/sys/fs/cgroup"))
    return int(min(psutil.virtual_memory().total, limit))


def _container_bytes(cgroup: Path) -> float:
    """Return what the control group's limit leaves; infinity where there is none (version 2 of the interface)."""
    limit, used = _container_limit(cgroup)
    return limit - used


def _container_limit(cgroup: Path) -> tuple[float, int]:
    """Return the control group's limit, infinity where there is none, and how much is used."""
    try:
        limit, used = ((cgroup / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return int(limit), int(used)
    except (OSError, ValueError):  # no control groups, or "max"
        return float("inf"), 0


def multiplies_fp8(device: torch.device) -> bool:
    """Return whether the device has e4m3 matrix instructions that Triton can reach."""
    if device.type != "cuda" or torch.version.hip is not None:  # AMD's GPUs have a capability, too, and other formats
        return False
    return torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 natively.

    A CPU without AVX512-BF16 and AMX is 27 times slower in bf16 than in fp32; one with AMX several times faster.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

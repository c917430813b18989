"""The expert backends by name, and the one table that says what `auto` means.

A backend is a function of tensors (`experts(hidden, index, weight, gate_up, down)`); the modelling file keeps its
readable loop and knows none of them. transformers calls a function registered in `ALL_EXPERTS_FUNCTIONS` with the
experts module as first argument, so each backend is registered once per computing dtype, under a name that says what
runs: `dsv3_cpu_fp32`, `dsv3_grouped_mm_bf16`, `dsv3_fp8_emulated`. That name is what a run records.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dsv3.errors import UserError
from dsv3.fp8.recipe import DEEPSEEK_RECIPE, Recipe

DTYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
FP8_CAPABILITY = (8, 9)
"""Ada and Hopper multiply e4m3; Triton refuses to compile it for anything older."""


@dataclass(frozen=True)
class Backend:
    """What a backend is made of, and what it needs."""

    module: str
    """Module with the function `experts`; imported when the backend is chosen."""
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    """Dtypes it computes in; the master weights are cast to it."""
    is_fp8: bool = False
    is_emulated: bool = False


ANY_DEVICE = ("cpu", "cuda")
BACKENDS = {
    "reference": Backend("reference", ANY_DEVICE, (torch.float64, torch.float32, torch.bfloat16)),
    "cpu": Backend("cpu", ("cpu",), (torch.float64, torch.float32, torch.bfloat16)),
    "grouped_mm": Backend("grouped_mm", ANY_DEVICE, (torch.float32, torch.bfloat16)),
    "bf16_emulated": Backend("bf16_emulated", ANY_DEVICE, (torch.bfloat16,), is_emulated=True),
    "triton_fp8": Backend("fp8_experts", ("cuda",), (torch.float32, torch.bfloat16), is_fp8=True),
    "fp8_emulated": Backend("fp8_experts", ANY_DEVICE, (torch.float32, torch.bfloat16), is_fp8=True, is_emulated=True),
}

AUTO = {
    # (device, fp8 in Hardware or not wanted, use_fp8): backend
    ("cpu", False): "cpu",
    ("cpu", True): "fp8_emulated",
    ("cuda", False): "grouped_mm",
    ("cuda", True): "triton_fp8",
}
"""What `auto` means by (device type, use_fp8); `auto_backend` holds the two exceptions, both of them emulations."""


def auto_backend(device: torch.device, compute_dtype: torch.dtype, use_fp8: bool) -> str:
    """Return the backend that `train.experts: auto` stands for."""
    if use_fp8 and not multiplies_fp8(device):
        return "fp8_emulated"
    if compute_dtype == torch.bfloat16 and not multiplies_bf16(device):
        return "bf16_emulated"
    return AUTO[device.type, use_fp8]


def multiplies_fp8(device: torch.device) -> bool:
    """Return whether the device has e4m3 matrix instructions that Triton can reach."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 natively: without AVX512-BF16 or AMX a CPU is 27 times slower at it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def experts_backend(
    name: str, device: torch.device, compute_dtype: torch.dtype, use_fp8: bool, recipe: Recipe = DEEPSEEK_RECIPE
) -> str:
    """Return the name to give to `model.set_experts_implementation`, after registering the backend under it.

    `name` is `train.experts`. Raises `UserError` for an unknown name and for a backend that can't run here.
    """
    name = auto_backend(device, compute_dtype, use_fp8) if name == "auto" else name
    if name not in BACKENDS:
        raise UserError(f"train.experts is {name}; must be one of auto, {', '.join(BACKENDS)}")
    reason = refusal(BACKENDS[name], device, compute_dtype, use_fp8)
    if reason:
        raise UserError(f"train.experts is {name}; {reason}, take auto")
    return _register(name, compute_dtype, recipe)


def refusal(backend: Backend, device: torch.device, compute_dtype: torch.dtype, use_fp8: bool) -> str | None:
    """Return why `backend` can't run, or None."""
    if device.type not in backend.devices:
        return f"runs on {' and '.join(backend.devices)}, not on {device.type}"
    if compute_dtype not in backend.dtypes:
        dtypes = " and ".join(DTYPE_NAMES[dtype] for dtype in backend.dtypes)
        return f"computes in {dtypes}, not in {DTYPE_NAMES.get(compute_dtype, compute_dtype)}"
    if backend.is_fp8 != use_fp8:
        return f"is {'the' if backend.is_fp8 else 'no'} FP8 backend while train.use_fp8 is {str(use_fp8).lower()}"
    if backend.is_fp8 and not backend.is_emulated and not multiplies_fp8(device):
        return "needs a GPU of compute capability 8.9 or higher"
    return None


def _register(name: str, compute_dtype: torch.dtype, recipe: Recipe) -> str:
    """Register the backend with transformers; return the name under which it stands."""
    backend = BACKENDS[name]
    function: Callable[..., Tensor] = import_module(f"dsv3.kernels.{backend.module}").experts
    options: dict[str, Any] = {}
    parts = ["dsv3", name]
    if backend.is_fp8:
        options = {"recipe": recipe, "is_emulated": backend.is_emulated}
        parts += recipe.deviations()
    dtype = torch.float32 if backend.is_emulated else compute_dtype
    if not backend.is_emulated:
        parts.append(DTYPE_NAMES[compute_dtype])

    def forward(experts: torch.nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the experts' output in the dtype of `hidden`, computed in the backend's."""
        with torch.autocast(hidden.device.type, enabled=False):
            output = function(
                hidden.to(dtype),
                top_k_index,
                top_k_weights.to(dtype),
                experts.gate_up_proj.to(dtype),
                experts.down_proj.to(dtype),
                **options,
            )
        return output.to(hidden.dtype)

    registered = "_".join(parts)
    ALL_EXPERTS_FUNCTIONS.register(registered, forward)
    return registered

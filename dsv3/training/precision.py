"""In which number format a training multiplies, and by which expert backend: decided once, and recorded."""

from dataclasses import fields
from typing import Any

import torch

from dsv3.devices import multiplies_bf16
from dsv3.fp8.recipe import Recipe
from dsv3.kernels.registry import refusal, register_experts
from dsv3.params.architecture import Architecture
from dsv3.params.expert_backends import BACKENDS
from dsv3.params.train import TrainParams

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolved_precision(precision: str, device: torch.device) -> str:
    """Return `fp32` or `bf16`; auto is bf16 on a GPU that multiplies it natively, fp32 on every CPU.

    So a CPU's result depends on no instruction set. Where a CPU has bf16 instructions, `bf16` trains nano 2.1 times as
    fast as fp32 (docs/log.md), and is to be asked for.
    """
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and multiplies_bf16(device) else "fp32"


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the format of native matrix products: bf16 where it is asked for and native, else fp32.

    `precision: bf16` on a device without native bf16 is emulated: operands are rounded to bf16, products are fp32.
    """
    is_bf16 = resolved_precision(precision, device) == "bf16" and multiplies_bf16(device)
    return torch.bfloat16 if is_bf16 else torch.float32


def fp8_recipe(train: TrainParams) -> Recipe:
    """Return how `use_fp8` quantizes: one recipe for the linear layers and the experts."""
    return Recipe(**{field.name: getattr(train, f"fp8_{field.name}") for field in fields(Recipe)})


def register_training_experts(train: TrainParams, architecture: Architecture, device: torch.device) -> str:
    """Register the expert backend of a training; return its name, as `model.set_experts_implementation` takes it.

    Raises `UserError` for a backend that can't run on `device`.
    """
    return register_experts(train.experts, **_experts_arguments(train, architecture, device))


def training_backends(train: TrainParams, architecture: Architecture, device: torch.device) -> list[str]:
    """Return the expert backends that the training could take on `device`."""
    arguments = _experts_arguments(train, architecture, device)
    return [name for name, backend in BACKENDS.items() if refusal(backend, **arguments) is None]


def _experts_arguments(train: TrainParams, architecture: Architecture, device: torch.device) -> dict[str, Any]:
    """Return what decides, besides `train.experts`, which expert backend runs."""
    return {
        "device": device,
        "compute_dtype": COMPUTE_DTYPES[resolved_precision(train.precision, device)],
        "use_fp8": train.use_fp8,
        "recipe": fp8_recipe(train),
        "widths": (architecture.hidden_size, architecture.moe_intermediate_size),
    }

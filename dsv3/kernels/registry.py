"""The function of each expert backend, and the choice of one for a device.

What the backends need and what `auto` means stands in `dsv3.params.expert_backends`. A backend is a function of tensors
(`experts(hidden, index, weight, gate_up, down)`); the modeling file keeps its readable loop and knows none of them.
transformers calls a function registered in `ALL_EXPERTS_FUNCTIONS` with the experts module as first argument, so each
backend is registered once per computing dtype, under a name that says what runs: `dsv3_cpu_fp32`,
`dsv3_grouped_mm_bf16`, `dsv3_fp8_emulated`. That name is what a run records.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dsv3.devices import multiplies_bf16, multiplies_fp8
from dsv3.errors import UserError
from dsv3.fp8.linear import Operands
from dsv3.fp8.recipe import DEEPSEEK_RECIPE, Recipe
from dsv3.fp8.rounding import BF16, Rounding, fp8_rounding
from dsv3.kernels import cpu, emulated_linear, grouped_mm, reference
from dsv3.kernels.expert_parallel import dispatch_and_combine, own_weight
from dsv3.params.expert_backends import AUTO, AUTO_UNSUITED, BACKENDS, ExpertBackend

DTYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
ExpertsFunction = Callable[..., Tensor]
"""From hidden (T, D), index and weight (T, K), gate_up (E, 2F, D), down (E, D, F) to the output (T, D)."""


@dataclass(frozen=True)
class Function:
    """What a backend computes by."""

    experts: ExpertsFunction
    weight_operands: Callable[[list[Tensor]], Operands] | None = None
    """From gate_up and down to what is multiplied, which `experts` then takes as one more argument, `operands`."""


def _reference(recipe: Recipe) -> Function:
    return Function(reference.experts)


def _cpu(recipe: Recipe) -> Function:
    return Function(cpu.experts)


def _grouped_mm(recipe: Recipe) -> Function:
    return Function(grouped_mm.experts)


def _emulation(rounding: Rounding) -> Function:
    operands = partial(emulated_linear.weight_operands, rounding=rounding)
    return Function(partial(cpu.experts, rounding=rounding), operands)


def _bf16_emulated(recipe: Recipe) -> Function:
    return _emulation(BF16)


def _fp8_emulated(recipe: Recipe) -> Function:
    return _emulation(fp8_rounding(recipe))


def _triton_fp8(recipe: Recipe) -> Function:
    from dsv3.kernels import triton_experts  # triton is not installed with every torch

    operands = partial(triton_experts.weight_operands, recipe=recipe)
    return Function(partial(triton_experts.experts, recipe=recipe), operands)


FUNCTIONS: dict[str, Callable[[Recipe], Function]] = {
    "reference": _reference,
    "cpu": _cpu,
    "grouped_mm": _grouped_mm,
    "bf16_emulated": _bf16_emulated,
    "triton_fp8": _triton_fp8,
    "fp8_emulated": _fp8_emulated,
}
"""Makes the function of each backend; only those of FP8 look at the recipe."""


def auto_backend(
    device: torch.device,
    compute_dtype: torch.dtype,
    use_fp8: bool,
    recipe: Recipe = DEEPSEEK_RECIPE,
    widths: Sequence[int] = (),
) -> str:
    """Return the backend that `auto` stands for."""
    is_fp8_native = multiplies_fp8(device) and recipe.has_kernels
    is_native = is_fp8_native if use_fp8 else compute_dtype != torch.bfloat16 or multiplies_bf16(device)
    name = AUTO[device.type, use_fp8, is_native]
    return AUTO_UNSUITED[name] if BACKENDS[name].width_refusal(widths, compute_dtype.itemsize) else name


def register_experts(
    name: str,
    device: torch.device,
    compute_dtype: torch.dtype,
    use_fp8: bool,
    recipe: Recipe = DEEPSEEK_RECIPE,
    widths: Sequence[int] = (),
) -> str:
    """Register the backend that `name` stands for with transformers; return what `set_experts_implementation` takes.

    `name` is `train.experts`, `widths` are the model's `hidden_size` and `moe_intermediate_size`. Raises `UserError`
    for an unknown name and for a backend that can't run here.
    """
    if use_fp8 and not (recipe.weight_quant or recipe.activation_quant):
        raise UserError(
            "train.use_fp8 is true with fp8_weight_quant and fp8_activation_quant both false; set one to true"
        )
    name = auto_backend(device, compute_dtype, use_fp8, recipe, widths) if name == "auto" else name
    if name not in BACKENDS:
        raise UserError(f"train.experts is {name}; must be one of auto, {', '.join(BACKENDS)}")
    reason = refusal(BACKENDS[name], device, compute_dtype, use_fp8, recipe, widths)
    if reason:
        raise UserError(f"train.experts is {name}; {reason}, take auto")
    return _register(name, compute_dtype, recipe)


def refusal(
    backend: ExpertBackend,
    device: torch.device,
    compute_dtype: torch.dtype,
    use_fp8: bool,
    recipe: Recipe = DEEPSEEK_RECIPE,
    widths: Sequence[int] = (),
) -> str | None:
    """Return why `backend` can't run, or None."""
    if device.type not in backend.devices:
        return f"runs on {' and '.join(backend.devices)}, not on {device.type}"
    dtype = DTYPE_NAMES.get(compute_dtype, str(compute_dtype))
    if dtype not in backend.dtypes:
        return f"computes in {' and '.join(backend.dtypes)}, not in {dtype}"
    if backend.is_fp8 != use_fp8:
        return f"is {'the' if backend.is_fp8 else 'no'} FP8 backend while train.use_fp8 is {str(use_fp8).lower()}"
    if backend.is_native_fp8 and not multiplies_fp8(device):
        return "needs a GPU of compute capability 8.9 or higher"
    if backend.is_native_fp8 and not recipe.has_kernels:
        return "quantizes weights and activations, not one of them, in blocks of 128"
    return backend.width_refusal(widths, compute_dtype.itemsize)


@dataclass(frozen=True)
class RegisteredBackend:
    """A backend as transformers calls it: with the experts module first."""

    function: Function
    dtype: torch.dtype
    """In which it computes."""
    weight_dtype: torch.dtype
    """In which it takes the weights."""

    def weight_operands(self, experts: Any) -> Operands | None:
        """Return what stands for the weights of `experts` in its products; None if the weights themselves do."""
        if self.function.weight_operands is None:
            return None
        return self.function.weight_operands([weight.to(self.weight_dtype) for weight in self._weights(experts)])

    def __call__(self, experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the experts' output in the dtype of `hidden`, computed in the backend's."""
        with torch.autocast(hidden.device.type, enabled=False):
            rows = hidden.to(self.dtype), top_k_index, top_k_weights.to(self.dtype)
            arguments: list[Any] = [weight.to(self.weight_dtype) for weight in self._weights(experts)]
            if self.function.weight_operands is not None:
                arguments.append(getattr(experts, "cached_operands", None))  # of `cached_weights`, within its block

            def own_experts(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
                return self.function.experts(hidden, index, weight, *arguments)

            group = getattr(experts, "expert_group", None)
            if group is None:
                output = own_experts(*rows)
            else:
                output = dispatch_and_combine(own_experts, *rows, experts.num_experts, group)
        return output.to(hidden.dtype)

    def _weights(self, experts: Any) -> tuple[Tensor, Tensor]:
        group = getattr(experts, "expert_group", None)
        weights = experts.gate_up_proj, experts.down_proj
        return weights if group is None else (own_weight(weights[0], group), own_weight(weights[1], group))


def _register(name: str, compute_dtype: torch.dtype, recipe: Recipe) -> str:
    """Register the backend with transformers; return the name under which it stands."""
    backend = BACKENDS[name]
    dtype = torch.float32 if backend.is_emulated else compute_dtype
    weight_dtype = torch.float32 if backend.is_fp8 else dtype  # the FP8 backends quantize the master weights
    parts = ["dsv3", name, *(recipe.deviations() if backend.is_fp8 else [])]
    registered = "_".join(parts if backend.is_emulated else [*parts, DTYPE_NAMES[compute_dtype]])
    ALL_EXPERTS_FUNCTIONS.register(registered, RegisteredBackend(FUNCTIONS[name](recipe), dtype, weight_dtype))
    return registered

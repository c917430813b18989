"""Linear layers whose three products run in FP8 on the GPU: the grouped kernels with one group.

Letters: R rows, K inputs, N outputs; E = 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.fp8.definition import BLOCK
from dsv3.fp8.recipe import Recipe
from dsv3.fp8.rounding import until_changed
from dsv3.kernels.triton_launch import (
    QuantisedWeight,
    Schedule,
    grouped_gemm,
    grouped_wgrad,
    quantise_columns,
    quantise_rows,
    quantise_weight,
    schedule,
)


def linear_product(x_RK: Tensor, weight_NK: Tensor, recipe: Recipe) -> Tensor:
    """Return x @ weight.T in the dtype of x, all three products in FP8; dimensions are padded to multiples of 128."""
    return _forward(x_RK, weight_NK, recipe.has_power_of_two_scales, recipe.quantises_wgrad)


def padded(x: Tensor, num_dims: int) -> Tensor:
    """Return `x`, contiguous, with its last dimensions padded by zeros to multiples of 128."""
    gaps = [-size % BLOCK for size in reversed(x.shape[-num_dims:])]
    return F.pad(x, [side for gap in gaps for side in (0, gap)]) if any(gaps) else x.contiguous()


def quantised(weight: Tensor, pow2: bool) -> QuantisedWeight:
    """Return the quantised weight or stack of weights, computed once per optimizer step."""

    def derive(weight: Tensor) -> QuantisedWeight:
        stack = weight if weight.dim() == 3 else weight[None]
        return quantise_weight(padded(stack, 2), pow2)

    return until_changed(weight, f"triton_fp8_{pow2}", derive)


def whole_schedule(x_RK: Tensor) -> Schedule:
    """Return the tiles of rows that all belong to one expert."""
    return schedule(torch.full((1,), len(x_RK), dtype=torch.int32, device=x_RK.device), len(x_RK))


@torch.library.custom_op("dsv3::linear_triton", mutates_args=())
def _forward(x_RK: Tensor, weight_NK: Tensor, pow2: bool, quantises_wgrad: bool) -> Tensor:
    """Return the product of the quantised operands."""
    rows = quantise_rows(padded(x_RK, 1), pow2)
    weight = quantised(weight_NK, pow2).forward
    y_RN = grouped_gemm(rows, None, weight, whole_schedule(x_RK), len(x_RK), x_RK.dtype)
    return y_RN[:, : len(weight_NK)].contiguous()


@_forward.register_fake
def _(x_RK: Tensor, weight_NK: Tensor, pow2: bool, quantises_wgrad: bool) -> Tensor:
    return x_RK.new_empty(x_RK.shape[0], weight_NK.shape[0])


@torch.library.custom_op("dsv3::linear_triton_backward", mutates_args=())
def _backward(
    grad_RN: Tensor, x_RK: Tensor, weight_NK: Tensor, pow2: bool, quantises_wgrad: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients by x, in its dtype, and by the master weight, in fp32."""
    num_outputs, num_inputs = weight_NK.shape
    tiles, grad, x = whole_schedule(x_RK), padded(grad_RN, 1), padded(x_RK, 1)
    weight = quantised(weight_NK, pow2).transposed
    grad_x_RK = grouped_gemm(quantise_rows(grad, pow2), None, weight, tiles, len(x), x.dtype)[:, :num_inputs]
    if not quantises_wgrad:
        return grad_x_RK.contiguous(), (grad_RN.bfloat16().t() @ x_RK.bfloat16()).float()
    grad_NR, x_KR = (quantise_columns(rows, tiles, None, pow2) for rows in (grad, x))
    grad_weight_NK = grouped_wgrad(grad_NR, x_KR, tiles, torch.float32)[0, :num_outputs, :num_inputs]
    return grad_x_RK.contiguous(), grad_weight_NK.contiguous()


@_backward.register_fake
def _(grad_RN: Tensor, x_RK: Tensor, weight_NK: Tensor, pow2: bool, quantises_wgrad: bool) -> tuple[Tensor, Tensor]:
    return x_RK.new_empty(x_RK.shape), weight_NK.new_empty(weight_NK.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the unquantised operands."""
    x_RK, weight_NK, ctx.pow2, ctx.quantises_wgrad = inputs
    ctx.save_for_backward(x_RK, weight_NK)


def _gradients(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients in the order of `_forward`'s arguments."""
    return *_backward(grad_RN, *ctx.saved_tensors, ctx.pow2, ctx.quantises_wgrad), None, None


_forward.register_autograd(_gradients, setup_context=_save)

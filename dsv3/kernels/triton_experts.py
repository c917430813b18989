"""Experts whose products run in FP8 on the GPU.

The same computation as `dsv3.kernels.cpu` with an FP8 rounding, launched as a few kernels for all experts at once.
Weights are quantised once per optimizer step; the tokens' rows are quantised before they are copied to their experts,
so a token with eight experts is quantised once.

Letters: T tokens, K experts per token, S = T * K pairs sorted by expert, E experts, H hidden size, I intermediate size;
in weight gradients N outputs and K inputs.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.errors import UserError
from dsv3.fp8.definition import BLOCK
from dsv3.fp8.recipe import Recipe
from dsv3.fp8.swiglu_cache import fake_kept, kept, restored
from dsv3.kernels.permute import expert_order, sum_per_token, with_inverse
from dsv3.kernels.swiglu import swiglu, swiglu_backward
from dsv3.kernels.triton_launch import (
    Schedule,
    grouped_gemm,
    grouped_wgrad,
    quantise_columns,
    quantise_rows,
    schedule,
)
from dsv3.kernels.triton_linear import quantised


def experts(
    hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, recipe: Recipe
) -> Tensor:
    """Return the weighted sum of each token's experts, shape (T, H), in the dtype of `hidden_TH`.

    Raises `UserError` where a dimension is no multiple of 128.
    """
    hidden_size, intermediate_size = down_EHI.shape[1:]
    if hidden_size % BLOCK or intermediate_size % BLOCK:
        raise UserError(
            f"train.experts is triton_fp8; needs dimensions that are multiples of {BLOCK}, not hidden_size "
            f"{hidden_size} and moe_intermediate_size {intermediate_size}, take fp8_emulated"
        )
    choices = recipe.has_power_of_two_scales, recipe.quantises_wgrad, recipe.caches_swiglu
    return _forward(hidden_TH, index_TK, weight_TK, gate_up_E2IH, down_EHI, *choices)[0]


def _wgrad(
    grad: tuple[Tensor, Tensor | None], x: tuple[Tensor, Tensor | None], tiles: Schedule, pow2: bool, is_fp8: bool
) -> Tensor:
    """Return the gradient of a stack of weights in fp32, from (rows, index into them or None) of both sides."""
    if is_fp8:
        grad_NS, x_KS = (quantise_columns(rows, tiles, index_S, pow2) for rows, index_S in (grad, x))
        return grouped_wgrad(grad_NS, x_KS, tiles, torch.float32)
    grad_SN, x_SK = ((rows if index_S is None else rows[index_S]).bfloat16() for rows, index_S in (grad, x))
    return F.grouped_mm(grad_SN.t(), x_SK, offs=tiles.end_E).float()


@torch.library.custom_op("dsv3::experts_triton", mutates_args=())
def _forward(  # noqa: PLR0913
    hidden_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    pow2: bool,
    quantises_wgrad: bool,
    caches_swiglu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and what the backward pass needs: gate and up of every pair, the order, the ends."""
    order = expert_order(index_TK, len(gate_up_E2IH))
    num_pairs, dtype = len(order.pair_S), hidden_TH.dtype
    tiles = schedule(order.end_E, num_pairs)
    gate_up, down = quantised(gate_up_E2IH, pow2).forward, quantised(down_EHI, pow2).forward
    rows = quantise_rows(hidden_TH.contiguous(), pow2)
    gate_up_S2I = grouped_gemm(rows, order.token_S, gate_up, tiles, num_pairs, dtype)
    act_SI = swiglu(gate_up_S2I).mul_(weight_TK.reshape(-1, 1)[order.pair_S])
    output_SH = grouped_gemm(quantise_rows(act_SI, pow2), None, down, tiles, num_pairs, dtype)
    waiting = kept(gate_up_S2I, partial(quantise_rows, pow2=pow2) if caches_swiglu else None)
    return sum_per_token(output_SH, order.position_TK), *waiting, order.pair_S, order.end_E


@_forward.register_fake
def _(  # noqa: PLR0913
    hidden_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    pow2: bool,
    quantises_wgrad: bool,
    caches_swiglu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_pairs = index_TK.shape[0] * index_TK.shape[1]
    return (
        torch.empty_like(hidden_TH, memory_format=torch.contiguous_format),
        *fake_kept(hidden_TH, (num_pairs, gate_up_E2IH.shape[1]), caches_swiglu),
        index_TK.new_empty(num_pairs, dtype=torch.int64),
        index_TK.new_empty(gate_up_E2IH.shape[0], dtype=torch.int32),
    )


@torch.library.custom_op("dsv3::experts_triton_backward", mutates_args=())
def _backward(  # noqa: PLR0913
    grad_TH: Tensor,
    hidden_TH: Tensor,
    weight_TK: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    kept_S2I: Tensor,
    scales: Tensor,
    pair_S: Tensor,
    end_E: Tensor,
    pow2: bool,
    quantises_wgrad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by hidden, weight, gate_up and down; those of the master weights in fp32."""
    order = with_inverse(pair_S, end_E, weight_TK.shape[1])
    tiles, num_pairs, dtype = schedule(end_E, len(pair_S)), len(pair_S), hidden_TH.dtype
    grad_TH, hidden_TH = grad_TH.contiguous(), hidden_TH.contiguous()
    gate_up, down = quantised(gate_up_E2IH, pow2).transposed, quantised(down_EHI, pow2).transposed
    weight_S1 = weight_TK.reshape(-1, 1)[pair_S]
    gate_up_S2I = restored(kept_S2I, scales, gate_up_E2IH.shape[1], dtype)
    gate_SI, up_SI = gate_up_S2I.chunk(2, dim=-1)
    silu_SI = F.silu(gate_SI)
    act_SI = silu_SI * up_SI
    rows = quantise_rows(grad_TH, pow2)
    grad_act_SI = grouped_gemm(rows, order.token_S, down, tiles, num_pairs, dtype)  # by weight * swiglu
    grad_weight_S = (grad_act_SI.float() * act_SI.float()).sum(-1).to(weight_TK.dtype)
    sides = (grad_TH, order.token_S), (act_SI.mul_(weight_S1), None)
    grad_down_EHI = _wgrad(*sides, tiles, pow2, quantises_wgrad)
    grad_S2I = swiglu_backward(grad_act_SI.mul_(weight_S1), gate_up_S2I, silu_SI)
    sides = (grad_S2I, None), (hidden_TH, order.token_S)
    grad_gate_up_E2IH = _wgrad(*sides, tiles, pow2, quantises_wgrad)
    grad_SH = grouped_gemm(quantise_rows(grad_S2I, pow2), None, gate_up, tiles, num_pairs, dtype)
    grad_hidden_TH = sum_per_token(grad_SH, order.position_TK)
    return grad_hidden_TH, grad_weight_S[order.position_TK], grad_gate_up_E2IH, grad_down_EHI


@_backward.register_fake
def _(  # noqa: PLR0913
    grad_TH: Tensor,
    hidden_TH: Tensor,
    weight_TK: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    kept_S2I: Tensor,
    scales: Tensor,
    pair_S: Tensor,
    end_E: Tensor,
    pow2: bool,
    quantises_wgrad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden_TH, memory_format=torch.contiguous_format),
        torch.empty_like(weight_TK, memory_format=torch.contiguous_format),
        gate_up_E2IH.new_empty(gate_up_E2IH.shape, dtype=torch.float32),
        down_EHI.new_empty(down_EHI.shape, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep for the backward pass what can't be recomputed cheaply."""
    ctx.set_materialize_grads(False)  # else zeros as large as gate and up, which nobody reads
    hidden_TH, _, weight_TK, gate_up_E2IH, down_EHI, ctx.pow2, ctx.quantises_wgrad, _ = inputs
    ctx.save_for_backward(hidden_TH, weight_TK, gate_up_E2IH, down_EHI, *output[1:])


def _gradients(ctx: Any, grad_TH: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Return the gradients in the order of `_forward`'s arguments."""
    if grad_TH is None:
        return (None,) * 8
    grads = _backward(grad_TH, *ctx.saved_tensors, ctx.pow2, ctx.quantises_wgrad)
    return grads[0], None, *grads[1:], None, None, None


_forward.register_autograd(_gradients, setup_context=_save)

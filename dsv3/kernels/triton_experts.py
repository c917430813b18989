"""Experts whose products run in FP8 on the GPU.

The same computation as `dsv3.kernels.cpu` with an FP8 rounding, launched as a few kernels for all experts at once.
The tokens' rows are quantized before they are copied to their experts, so a token with eight experts is quantized once.

Letters: T tokens, K num_experts_per_tok, A assignments, E n_routed_experts, D hidden_size, F intermediate_size,
I inputs, O outputs.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.errors import UserError
from dsv3.fp8.linear import Operands
from dsv3.fp8.recipe import DEEPSEEK_RECIPE, RECIPES, Recipe
from dsv3.fp8.swiglu_cache import packed, unpacked
from dsv3.kernels.op import expert_shapes, experts_op
from dsv3.kernels.permute import expert_order, sum_per_token, with_inverse
from dsv3.kernels.swiglu import swiglu, swiglu_backward
from dsv3.kernels.triton_launch import (
    Schedule,
    grouped_gemm,
    grouped_wgrad,
    quantize_columns,
    quantize_rows,
    schedule,
)
from dsv3.kernels.triton_linear import dgrad_operand, forward_operand, weight_operands
from dsv3.params.expert_backends import BACKENDS

Side = tuple[Tensor, Tensor | None]
"""Rows, and an index into them or None."""


def experts(  # noqa: PLR0913 (a backend's arguments)
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    operands: Operands | None = None,
    recipe: Recipe = DEEPSEEK_RECIPE,
) -> Tensor:
    """Return the weighted sum of each token's experts, shape (T, D), in the dtype of `hidden_TD`.

    `operands` are `weight_operands` of gate_up and down, made here where they are not given. Raises `UserError` where
    a dimension is no multiple of 128.
    """
    reason = BACKENDS["triton_fp8"].width_refusal(down_EDF.shape[1:], hidden_TD.itemsize)
    if reason:
        raise UserError(f"train.experts is triton_fp8; {reason}, take auto")
    operands = weight_operands([gate_up_E2FD, down_EDF], recipe) if operands is None else operands
    return _experts_triton(hidden_TD, index_TK, weight_TK, gate_up_E2FD, down_EDF, operands, recipe.name)[0]


def _wgrad(grad: Side, x: Side, tiles: Schedule, recipe: Recipe) -> Tensor:
    """Return the gradient of a stack of weights in fp32."""
    if recipe.wgrad_quant:
        scales = recipe.power_of_two_scales
        grad_OA, x_IA = (quantize_columns(rows, tiles, index_A, scales) for rows, index_A in (grad, x))
        return grouped_wgrad(grad_OA, x_IA, tiles, torch.float32)
    grad_AO, x_AI = ((rows if index_A is None else rows[index_A]).bfloat16() for rows, index_A in (grad, x))
    return F.grouped_mm(grad_AO.t(), x_AI, offs=tiles.end_E).float()


def _forward(  # noqa: PLR0913 (an operator's arguments)
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    operands: list[Tensor],
    recipe: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and what the backward pass needs: gate and up of every assignment, the order, the ends."""
    choice = RECIPES[recipe]
    quantize = partial(quantize_rows, power_of_two_scales=choice.power_of_two_scales)
    order = expert_order(index_TK, len(gate_up_E2FD))
    num_assignments, dtype = len(order.assignment_A), hidden_TD.dtype
    tiles = schedule(order.end_E, num_assignments)
    gate_up, down = forward_operand(operands, 0), forward_operand(operands, 1)
    rows = quantize(hidden_TD.contiguous())
    gate_up_A2F = grouped_gemm(rows, order.token_A, gate_up, tiles, num_assignments, dtype)
    act_AF = swiglu(gate_up_A2F).mul_(weight_TK.reshape(-1, 1)[order.assignment_A])
    output_AD = grouped_gemm(quantize(act_AF), None, down, tiles, num_assignments, dtype)
    kept = packed(gate_up_A2F, quantize if choice.swiglu_cache else None)
    return sum_per_token(output_AD, order.position_TK), *kept, order.assignment_A, order.end_E


def _backward(  # noqa: PLR0913 (an operator's arguments)
    grad_TD: Tensor,
    hidden_TD: Tensor,
    weight_TK: Tensor,
    operands: list[Tensor],
    packed_A2F: Tensor,
    scales: Tensor,
    assignment_A: Tensor,
    end_E: Tensor,
    recipe: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by hidden, weight, gate_up and down; those of the master weights in fp32."""
    choice, (gate_up_shape, _) = RECIPES[recipe], expert_shapes(operands)
    quantize = partial(quantize_rows, power_of_two_scales=choice.power_of_two_scales)
    order = with_inverse(assignment_A, end_E, weight_TK.shape[1])
    num_assignments, dtype = len(assignment_A), hidden_TD.dtype
    tiles = schedule(end_E, num_assignments)
    grad_TD, hidden_TD = grad_TD.contiguous(), hidden_TD.contiguous()
    gate_up, down = dgrad_operand(operands, 0), dgrad_operand(operands, 1)
    weight_A1 = weight_TK.reshape(-1, 1)[assignment_A]
    gate_up_A2F = unpacked(packed_A2F, scales, gate_up_shape[1], dtype)
    gate_AF, up_AF = gate_up_A2F.chunk(2, dim=-1)
    silu_AF = F.silu(gate_AF)
    act_AF = silu_AF * up_AF
    rows = quantize(grad_TD)
    grad_act_AF = grouped_gemm(rows, order.token_A, down, tiles, num_assignments, dtype)  # by weight * swiglu
    grad_weight_A = (grad_act_AF.float() * act_AF.float()).sum(-1).to(weight_TK.dtype)
    grad_down_EDF = _wgrad((grad_TD, order.token_A), (act_AF.mul_(weight_A1), None), tiles, choice)
    grad_A2F = swiglu_backward(grad_act_AF.mul_(weight_A1), gate_up_A2F, silu_AF)
    grad_gate_up_E2FD = _wgrad((grad_A2F, None), (hidden_TD, order.token_A), tiles, choice)
    grad_AD = grouped_gemm(quantize(grad_A2F), None, gate_up, tiles, num_assignments, dtype)
    grad_hidden_TD = sum_per_token(grad_AD, order.position_TK)
    return grad_hidden_TD, grad_weight_A[order.position_TK], grad_gate_up_E2FD, grad_down_EDF


_experts_triton = experts_op("experts_triton", _forward, _backward, weight_grad_dtype=torch.float32)

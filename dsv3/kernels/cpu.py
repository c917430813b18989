"""Experts on a CPU: one sort, then matrix products on contiguous slices, with a hand-written backward pass.

What is slow elsewhere, and what is done about it:

* Indexing `weight[e]` in an autograd loop gives each of the E experts a gradient as large as the whole stack, mostly
  zeros. Here every product writes its slice of one gradient tensor (`mm(out=)`).
* A few experts are taken at a time: as many as make the activation long enough for every thread to get its share of
  it, and no more than stay in the cache, so that rows are multiplied just after they were gathered. One by one, small
  experts are a thousand short operations in which the threads mostly meet; all at once, everything comes from memory.
* The routing weight scales the activation (F columns) instead of the expert's output (D columns). With
  p = weight * swiglu and o = p @ down.T its gradient is sum(swiglu * (do @ down)), so neither o nor the gathered input
  has to be kept: the backward pass needs the layer's input, the (A, 2F) input of the activation (in FP8, if the
  rounding says so), and the order.
* In bf16, oneDNN compiles a kernel for each shape that it has not seen, which takes as long as three products of an
  expert, and an expert's number of rows is hardly ever the same. So bf16 rows are multiplied in two pieces, of which
  both have few sizes; a weight's gradient is their sum, rounded to bf16 once more.

Both passes are custom operators, so that torch.compile takes each as one opaque node: the loop's bounds are data.

Letters: T tokens, K num_experts_per_tok, A assignments, E n_routed_experts, D hidden_size, F intermediate_size,
R rows, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.fp8.linear import Operands
from dsv3.fp8.rounding import EXACT, ROUNDINGS, Rounding
from dsv3.fp8.swiglu_cache import packed, unpacked
from dsv3.kernels.emulated_linear import weight_operands
from dsv3.kernels.op import dgrad_operands, experts_op, forward_operands
from dsv3.kernels.permute import ExpertRows, expert_groups, expert_order, sum_per_token, with_inverse
from dsv3.kernels.swiglu import swiglu_backward

NUMBERS_AT_A_TIME = 1 << 18
"""Numbers of the activation (R, F) that are computed together, at least. A thread of torch's takes 32,768 or more."""

ROWS_TOGETHER = 64
"""The first piece of bf16 rows has a multiple of so many, the second fewer: at most 63 sizes."""


def experts(  # noqa: PLR0913 (a backend's arguments)
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    operands: Operands | None = None,
    rounding: Rounding = EXACT,
) -> Tensor:
    """Return the weighted sum of each token's experts, shape (T, D); all floating tensors of one dtype.

    `rounding` is applied to the operands of every product, which emulates a lower precision. `operands` are
    `weight_operands` of gate_up and down, made here where they are not given.
    """
    operands = weight_operands([gate_up_E2FD, down_EDF], rounding) if operands is None else operands
    return _experts_cpu(hidden_TD, index_TK, weight_TK, gate_up_E2FD, down_EDF, operands, rounding.name)[0]


def rows_at_a_time(down_EDF: Tensor) -> int:
    """Return how many rows the activation should have at a time, at least."""
    return NUMBERS_AT_A_TIME // down_EDF.shape[-1]


def pieces(part: slice, dtype: torch.dtype) -> list[slice]:
    """Return the pieces in which the rows `part` are multiplied: one, or in bf16 up to two."""
    if dtype != torch.bfloat16:
        return [part]
    middle = part.stop - (part.stop - part.start) % ROWS_TOGETHER
    return [piece for piece in (slice(part.start, middle), slice(middle, part.stop)) if piece.start < piece.stop]


def _multiply(parts: ExpertRows, rows_RI: Tensor, weight_EIO: Tensor, out: Tensor) -> None:
    """Write each expert's rows times its weight to its rows of `out`, (R, O)."""
    for expert, part in parts:
        for piece in pieces(part, rows_RI.dtype):
            torch.mm(rows_RI[piece], weight_EIO[expert], out=out[piece])


def _weight_gradients(parts: ExpertRows, grad_RO: Tensor, input_RI: Tensor, to: Rounding, out: Tensor) -> None:
    """Write each expert's gradient, the product of its rows, to its place in `out`, (E, O, I)."""
    for expert, part in parts:
        own_grad_RO, own_RI = to.of_columns(grad_RO[part]), to.of_columns(input_RI[part])
        first, *others = pieces(slice(0, len(own_RI)), own_RI.dtype)
        torch.mm(own_grad_RO[first].t(), own_RI[first], out=out[expert])
        for piece in others:
            out[expert].addmm_(own_grad_RO[piece].t(), own_RI[piece])


def _forward(  # noqa: PLR0913 (an operator's arguments)
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    operands: list[Tensor],
    rounding: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and what the backward pass needs: gate and up of every assignment, the order, the ends."""
    to = ROUNDINGS[rounding]
    order = expert_order(index_TK, gate_up_E2FD.shape[0])
    operand_TD = to.of_rows(hidden_TD)
    gate_up_ED2F, down_EFD = (operand.transpose(1, 2) for operand in forward_operands(operands, 2))
    weight_A1 = weight_TK.reshape(-1, 1)[order.assignment_A]
    gate_up_A2F = hidden_TD.new_empty(len(weight_A1), gate_up_E2FD.shape[1])
    output_AD = hidden_TD.new_empty(len(weight_A1), hidden_TD.shape[1])
    for rows, parts in expert_groups(order.end_E, rows_at_a_time(down_EDF)):
        gate_up_R2F = gate_up_A2F[rows]
        _multiply(parts, operand_TD.index_select(0, order.token_A[rows]), gate_up_ED2F, out=gate_up_R2F)
        gate_RF, up_RF = gate_up_R2F.chunk(2, dim=-1)
        act_RF = F.silu(gate_RF).mul_(up_RF).mul_(weight_A1[rows])
        _multiply(parts, to.of_rows(act_RF), down_EFD, out=output_AD[rows])
    output_TD = sum_per_token(output_AD, order.position_TK)
    return output_TD, *packed(gate_up_A2F, to.swiglu_cache), order.assignment_A, order.end_E


def _backward(  # noqa: PLR0913 (an operator's arguments)
    grad_TD: Tensor,
    hidden_TD: Tensor,
    weight_TK: Tensor,
    operands: list[Tensor],
    packed_A2F: Tensor,
    scales: Tensor,
    assignment_A: Tensor,
    end_E: Tensor,
    rounding: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by hidden, weight, gate_up and down."""
    to, (gate_up_E2FD, down_EDF) = ROUNDINGS[rounding], dgrad_operands(operands, 2)
    order = with_inverse(assignment_A, end_E, weight_TK.shape[1])
    operand_TD = to.of_rows(grad_TD)
    weight_A1 = weight_TK.reshape(-1, 1)[assignment_A]
    grad_gate_up_E2FD, grad_down_EDF = torch.empty_like(gate_up_E2FD), torch.empty_like(down_EDF)
    idle_E = torch.diff(end_E, prepend=end_E.new_zeros(1)) == 0
    for expert in idle_E.nonzero().flatten().tolist():  # by mask, both stacks would be read and written whole
        grad_gate_up_E2FD[expert].zero_()
        grad_down_EDF[expert].zero_()
    grad_hidden_AD = hidden_TD.new_empty(len(assignment_A), hidden_TD.shape[1])
    grad_weight_A = weight_A1.new_empty(len(assignment_A))
    for rows, parts in expert_groups(end_E, rows_at_a_time(down_EDF)):
        token_R, weight_R1 = order.token_A[rows], weight_A1[rows]
        gate_up_R2F = unpacked(packed_A2F[rows], scales[rows], gate_up_E2FD.shape[1], hidden_TD.dtype)
        gate_RF, up_RF = gate_up_R2F.chunk(2, dim=-1)
        operand_RD = operand_TD.index_select(0, token_R)
        grad_act_RF = hidden_TD.new_empty(gate_RF.shape)  # by weight * swiglu
        _multiply(parts, operand_RD, down_EDF, out=grad_act_RF)
        silu_RF = F.silu(gate_RF)
        act_RF = silu_RF * up_RF
        torch.sum(grad_act_RF * act_RF, dim=-1, out=grad_weight_A[rows])
        grad_RD = operand_RD if to is EXACT else grad_TD.index_select(0, token_R)
        _weight_gradients(parts, grad_RD, act_RF.mul_(weight_R1), to, out=grad_down_EDF)
        grad_R2F = swiglu_backward(grad_act_RF.mul_(weight_R1), gate_up_R2F, silu_RF)
        _weight_gradients(parts, grad_R2F, hidden_TD.index_select(0, token_R), to, out=grad_gate_up_E2FD)
        _multiply(parts, to.of_rows(grad_R2F), gate_up_E2FD, out=grad_hidden_AD[rows])
    grad_weight_TK = grad_weight_A[order.position_TK]
    return sum_per_token(grad_hidden_AD, order.position_TK), grad_weight_TK, grad_gate_up_E2FD, grad_down_EDF


_experts_cpu = experts_op("experts_cpu", _forward, _backward)

"""Experts on a CPU: one sort, then matrix products on contiguous slices, with a hand-written backward pass.

What is slow elsewhere, and what is done about it:

* Indexing `weight[e]` in an autograd loop gives each of the E experts a gradient as large as the whole stack, mostly
  zeros. Here every product writes its slice of one gradient tensor (`mm(out=)`).
* A few experts are taken at a time: as many as make the activation long enough for every thread to get its share of
  it, and no more than stay in the cache, so that rows are multiplied just after they were gathered. One by one, small
  experts are a thousand short operations in which the threads mostly meet; all at once, everything comes from memory.
* The routing weight scales the activation (I columns) instead of the expert's output (H columns). With
  p = weight * swiglu and o = p @ down.T its gradient is sum(swiglu * (do @ down)), so neither o nor the gathered input
  has to be kept: the backward pass needs the layer's input, the (S, 2I) input of the activation (in FP8, if the
  rounding says so), and the order.

Both passes are custom operators, so that torch.compile takes each as one opaque node: the loop's bounds are data.

Letters: T tokens, K experts per token, S = T * K pairs sorted by expert, E experts, H hidden size, I intermediate size,
n rows of a few experts, X and Y widths of any two operands.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.fp8.rounding import EXACT, ROUNDINGS, Rounding
from dsv3.fp8.swiglu_cache import fake_kept, kept, restored
from dsv3.kernels.permute import Parts, expert_order, neighbours, sum_per_token, with_inverse
from dsv3.kernels.swiglu import swiglu_backward

NUMBERS_AT_A_TIME = 1 << 18
"""Numbers of the activation (n, I) that are computed together, at least. A thread of torch's takes 32,768 or more."""


def experts(
    hidden_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    rounding: Rounding = EXACT,
) -> Tensor:
    """Return the weighted sum of each token's experts, shape (T, H); all floating tensors of one dtype.

    `rounding` is applied to the operands of every product, which emulates a lower precision.
    """
    return _forward(hidden_TH, index_TK, weight_TK, gate_up_E2IH, down_EHI, rounding.name)[0]


def rows_at_a_time(down_EHI: Tensor) -> int:
    """Return how many rows the activation should have at a time, at least."""
    return NUMBERS_AT_A_TIME // down_EHI.shape[-1]


def _multiply(parts: Parts, rows_nX: Tensor, weight_EXY: Tensor, out: Tensor) -> None:
    """Write each expert's rows times its weight to its rows of `out`, (n, Y)."""
    for expert, part in parts:
        torch.mm(rows_nX[part], weight_EXY[expert], out=out[part])


def _weight_gradients(parts: Parts, grad_nX: Tensor, input_nY: Tensor, to: Rounding, out: Tensor) -> None:
    """Write each expert's gradient, the product of its rows, to its place in `out`, (E, X, Y)."""
    for expert, part in parts:
        torch.mm(to.of_columns(grad_nX[part]).t(), to.of_columns(input_nY[part]), out=out[expert])


@torch.library.custom_op("dsv3::experts_cpu", mutates_args=())
def _forward(
    hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, rounding: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and what the backward pass needs: gate and up of every pair, the order, the ends."""
    to = ROUNDINGS[rounding]
    order = expert_order(index_TK, gate_up_E2IH.shape[0])
    operand_TH = to.of_rows(hidden_TH)
    gate_up_EH2I, down_EIH = to.of_weight(gate_up_E2IH).transpose(1, 2), to.of_weight(down_EHI).transpose(1, 2)
    weight_S1 = weight_TK.reshape(-1, 1)[order.pair_S]
    gate_up_S2I = hidden_TH.new_empty(len(weight_S1), gate_up_E2IH.shape[1])
    output_SH = hidden_TH.new_empty(len(weight_S1), hidden_TH.shape[1])
    for rows, parts in neighbours(order.end_E, rows_at_a_time(down_EHI)):
        gate_up_n2I = gate_up_S2I[rows]
        _multiply(parts, operand_TH.index_select(0, order.token_S[rows]), gate_up_EH2I, out=gate_up_n2I)
        gate_nI, up_nI = gate_up_n2I.chunk(2, dim=-1)
        act_nI = F.silu(gate_nI).mul_(up_nI).mul_(weight_S1[rows])
        _multiply(parts, to.of_rows(act_nI), down_EIH, out=output_SH[rows])
    return sum_per_token(output_SH, order.position_TK), *kept(gate_up_S2I, to.cache), order.pair_S, order.end_E


@_forward.register_fake
def _(
    hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, rounding: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_pairs = index_TK.shape[0] * index_TK.shape[1]
    return (
        torch.empty_like(hidden_TH, memory_format=torch.contiguous_format),
        *fake_kept(hidden_TH, (num_pairs, gate_up_E2IH.shape[1]), ROUNDINGS[rounding].cache is not None),
        index_TK.new_empty(num_pairs, dtype=torch.int64),
        index_TK.new_empty(gate_up_E2IH.shape[0], dtype=torch.int32),
    )


@torch.library.custom_op("dsv3::experts_cpu_backward", mutates_args=())
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
    rounding: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by hidden, weight, gate_up and down."""
    to = ROUNDINGS[rounding]
    order = with_inverse(pair_S, end_E, weight_TK.shape[1])
    operand_TH, operand_gate_up, operand_down = to.of_rows(grad_TH), to.of_weight(gate_up_E2IH), to.of_weight(down_EHI)
    weight_S1 = weight_TK.reshape(-1, 1)[pair_S]
    grad_gate_up_E2IH, grad_down_EHI = torch.empty_like(gate_up_E2IH), torch.empty_like(down_EHI)
    idle_E = torch.diff(end_E, prepend=end_E.new_zeros(1)) == 0
    for expert in idle_E.nonzero().flatten().tolist():  # by mask, both stacks would be read and written whole
        grad_gate_up_E2IH[expert].zero_()
        grad_down_EHI[expert].zero_()
    grad_hidden_SH = hidden_TH.new_empty(len(pair_S), hidden_TH.shape[1])
    grad_weight_S = weight_S1.new_empty(len(pair_S))
    for rows, parts in neighbours(end_E, rows_at_a_time(down_EHI)):
        token_n, weight_n1 = order.token_S[rows], weight_S1[rows]
        gate_up_n2I = restored(kept_S2I[rows], scales[rows], gate_up_E2IH.shape[1], hidden_TH.dtype)
        gate_nI, up_nI = gate_up_n2I.chunk(2, dim=-1)
        operand_nH = operand_TH.index_select(0, token_n)
        grad_act_nI = hidden_TH.new_empty(gate_nI.shape)  # by weight * swiglu
        _multiply(parts, operand_nH, operand_down, out=grad_act_nI)
        silu_nI = F.silu(gate_nI)
        act_nI = silu_nI * up_nI
        torch.sum(grad_act_nI * act_nI, dim=-1, out=grad_weight_S[rows])
        grad_nH = operand_nH if to is EXACT else grad_TH.index_select(0, token_n)
        _weight_gradients(parts, grad_nH, act_nI.mul_(weight_n1), to, out=grad_down_EHI)
        grad_n2I = swiglu_backward(grad_act_nI.mul_(weight_n1), gate_up_n2I, silu_nI)
        _weight_gradients(parts, grad_n2I, hidden_TH.index_select(0, token_n), to, out=grad_gate_up_E2IH)
        _multiply(parts, to.of_rows(grad_n2I), operand_gate_up, out=grad_hidden_SH[rows])
    grad_weight_TK = grad_weight_S[order.position_TK]
    return sum_per_token(grad_hidden_SH, order.position_TK), grad_weight_TK, grad_gate_up_E2IH, grad_down_EHI


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
    rounding: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden_TH, memory_format=torch.contiguous_format),
        torch.empty_like(weight_TK, memory_format=torch.contiguous_format),
        torch.empty_like(gate_up_E2IH),
        torch.empty_like(down_EHI),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep for the backward pass what can't be recomputed cheaply."""
    ctx.set_materialize_grads(False)  # else zeros as large as gate and up, which nobody reads
    hidden_TH, _, weight_TK, gate_up_E2IH, down_EHI, ctx.rounding = inputs
    ctx.save_for_backward(hidden_TH, weight_TK, gate_up_E2IH, down_EHI, *output[1:])


def _gradients(ctx: Any, grad_TH: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Return the gradients in the order of `_forward`'s arguments."""
    if grad_TH is None:
        return (None,) * 6
    grad_hidden, grad_weight, grad_gate_up, grad_down = _backward(grad_TH, *ctx.saved_tensors, ctx.rounding)
    return grad_hidden, None, grad_weight, grad_gate_up, grad_down, None


_forward.register_autograd(_gradients, setup_context=_save)

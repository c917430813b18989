"""Custom operators of torch.library: forward and backward passes that torch.compile takes as one opaque node each.

An operator is a pure function of its arguments: tensors, lists of tensors, strings. The master weights are arguments
because they get gradients; what is multiplied are their operands, rounded or quantized by the caller.

`linear_op` and `experts_op` say once, for the emulation and for the Triton kernels alike, which shapes come out (what
torch.compile asks), what is kept for the backward pass, and in which order the gradients are returned.

Letters: T tokens, K num_experts_per_tok, A assignments, E n_routed_experts, D hidden_size, F intermediate_size,
R rows, I inputs, O outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from dsv3.fp8.recipe import RECIPES
from dsv3.fp8.swiglu_cache import empty_packed

LinearForward = Callable[[Tensor, list[Tensor], list[Tensor], str], list[Tensor]]
"""From x (R, I), master weights (O, I) that may differ in O, the operands of all and the name of a rounding or recipe
to the product (R, O) with each weight. Layers that read one x share its rounding so."""
LinearBackward = Callable[[list[Tensor], Tensor, list[Tensor], str], tuple[Tensor, list[Tensor]]]
"""From the gradients (R, O), x, the operands and the name to the gradients by x and, in fp32, by each weight."""
ExpertsOutput = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
ExpertsForward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], str], ExpertsOutput]
"""From hidden (T, D), index and weight (T, K), gate_up (E, 2F, D), down (E, D, F), their operands and the name to the
output (T, D) and four tensors for the backward pass: packed gate and up (A, 2F), their scales, the order, the ends."""
ExpertsBackward = Callable[
    [Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor, str], tuple[Tensor, Tensor, Tensor, Tensor]
]
"""From the gradient (T, D), hidden, weight, the operands, those four tensors and the name to the gradients by hidden,
weight, gate_up and down."""


def op(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> CustomOpDef:
    """Register `function` as operator dsv3::`name`, whose results have the shapes of those of `fake`; return it."""
    defined = torch.library.custom_op(f"dsv3::{name}", function, mutates_args=())
    defined.register_fake(fake)
    return defined


def linear_op(name: str, forward: LinearForward, backward: LinearBackward) -> CustomOpDef:
    """Register the operators `name` and `name`_backward of linear products of one x; return the first."""

    def fake(x_RI: Tensor, weights: list[Tensor], operands: list[Tensor], recipe: str) -> list[Tensor]:
        return [x_RI.new_empty(x_RI.shape[0], weight_OI.shape[0]) for weight_OI in weights]

    def fake_backward(
        grads: list[Tensor], x_RI: Tensor, operands: list[Tensor], recipe: str
    ) -> tuple[Tensor, list[Tensor]]:
        shapes = [(grad_RO.shape[1], x_RI.shape[1]) for grad_RO in grads]
        return x_RI.new_empty(x_RI.shape), [x_RI.new_empty(shape, dtype=torch.float32) for shape in shapes]

    def save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        x_RI, _, operands, ctx.recipe = inputs
        ctx.save_for_backward(x_RI, *operands)

    def gradients(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
        x_RI, *operands = ctx.saved_tensors
        return *backward_op(grads, x_RI, operands, ctx.recipe), [None] * len(operands), None

    forward_op, backward_op = op(name, forward, fake), op(f"{name}_backward", backward, fake_backward)
    forward_op.register_autograd(gradients, setup_context=save)
    return forward_op


def experts_op(
    name: str, forward: ExpertsForward, backward: ExpertsBackward, weight_grad_dtype: torch.dtype | None = None
) -> CustomOpDef:
    """Register the operators `name` and `name`_backward of the routed experts; return the first.

    The weights' gradients have `weight_grad_dtype`, by default that of `hidden`.
    """

    def fake_backward(  # noqa: PLR0913 (an operator's arguments)
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
        gate_up_shape, down_shape = expert_shapes(operands)
        return (
            torch.empty_like(hidden_TD, memory_format=torch.contiguous_format),
            torch.empty_like(weight_TK, memory_format=torch.contiguous_format),
            hidden_TD.new_empty(gate_up_shape, dtype=weight_grad_dtype),
            hidden_TD.new_empty(down_shape, dtype=weight_grad_dtype),
        )

    def gradients(ctx: Any, grad_TD: Tensor | None, *_: None) -> tuple[Any, ...]:
        hidden_TD, weight_TK, packed_A2F, scales, assignment_A, end_E, *operands = ctx.saved_tensors
        unused = [None] * len(operands)
        if grad_TD is None:
            return *(None,) * 5, unused, None
        order = packed_A2F, scales, assignment_A, end_E
        found = backward_op(grad_TD, hidden_TD, weight_TK, operands, *order, ctx.recipe)
        return found[0], None, *found[1:], unused, None

    forward_op, backward_op = op(name, forward, _empty_experts), op(f"{name}_backward", backward, fake_backward)
    forward_op.register_autograd(gradients, setup_context=_save_experts)
    return forward_op


def _empty_experts(  # noqa: PLR0913 (an operator's arguments)
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    operands: list[Tensor],
    recipe: str,
) -> ExpertsOutput:
    """Return empty tensors of the shapes and dtypes that a forward pass gives."""
    num_assignments, num_experts = index_TK.shape[0] * index_TK.shape[1], gate_up_E2FD.shape[0]
    is_quantized = recipe in RECIPES and RECIPES[recipe].swiglu_cache
    return (
        torch.empty_like(hidden_TD, memory_format=torch.contiguous_format),
        *empty_packed(hidden_TD, (num_assignments, gate_up_E2FD.shape[1]), is_quantized),
        index_TK.new_empty(num_assignments, dtype=torch.int64),
        index_TK.new_empty(num_experts, dtype=torch.int32),
    )


def _save_experts(ctx: Any, inputs: tuple[Any, ...], output: ExpertsOutput) -> None:
    """Keep for the backward pass what can't be computed again at little cost."""
    ctx.set_materialize_grads(False)  # else zeros as large as gate and up, which nobody reads
    hidden_TD, _, weight_TK, _, _, operands, ctx.recipe = inputs
    ctx.save_for_backward(hidden_TD, weight_TK, *output[1:], *operands)


def expert_shapes(operands: list[Tensor]) -> tuple[torch.Size, torch.Size]:
    """Return the shapes of gate_up (E, 2F, D) and down (E, D, F); the first half of `operands` is of gate_up."""
    return operands[0].shape, operands[len(operands) // 2].shape


def forward_operands(operands: list[Tensor], num_weights: int) -> list[Tensor]:
    """Return one operand per weight, of the one or two that each has: forward's."""
    return operands[:: len(operands) // num_weights]


def dgrad_operands(operands: list[Tensor], num_weights: int) -> list[Tensor]:
    """Return one operand per weight, of the one or two that each has: dgrad's."""
    each = len(operands) // num_weights
    return operands[each - 1 :: each]


def sum_in_place(parts: list[Tensor]) -> Tensor:
    """Return the sum of `parts`, added to the first of them."""
    total, *others = parts
    for part in others:
        total += part
    return total

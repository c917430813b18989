"""Linear layers whose three products (forward, dgrad, wgrad) take low-precision operands.

The layer owns no weights of its own: it holds the very `Parameter` of the layer that it replaces, in high precision.
Optimizer, checkpoints and export see no difference, and a run can change its precision at any checkpoint.

Letters: R rows (tokens), K inputs, N outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.fp8.rounding import ROUNDINGS

Product = Callable[[Tensor, Tensor], Tensor]
"""From x (R, K) and the master weight (N, K) to x @ weight.T (R, N), with gradients."""


class LowPrecisionLinear(nn.Linear):
    """A Linear that multiplies through `product` and shares the parameters of `original`."""

    def __init__(self, original: nn.Linear, product: Product) -> None:
        super().__init__(original.in_features, original.out_features, original.bias is not None, device="meta")
        self.weight, self.bias = original.weight, original.bias
        self.product = product

    def forward(self, input: Tensor) -> Tensor:
        """Return x @ weight.T + bias in the dtype that autocast asks for, or that of `input`."""
        device = input.device.type
        is_autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_autocast else input.dtype
        with torch.autocast(device, enabled=False):
            output = self.product(input.reshape(-1, self.in_features), self.weight).to(dtype)
            output = output if self.bias is None else output + self.bias.to(dtype)
        return output.view(*input.shape[:-1], self.out_features)


def rounded_product(x_RK: Tensor, weight_NK: Tensor, rounding: str) -> Tensor:
    """Return x @ weight.T in fp32 with every operand rounded by `ROUNDINGS[rounding]`; the gradients likewise."""
    return _forward(x_RK.float(), weight_NK, rounding)


@torch.library.custom_op("dsv3::rounded_linear", mutates_args=())
def _forward(x_RK: Tensor, weight_NK: Tensor, rounding: str) -> Tensor:
    """Return the product of the rounded operands."""
    to = ROUNDINGS[rounding]
    return to.of_rows(x_RK) @ to.of_weight(weight_NK).t()


@_forward.register_fake
def _(x_RK: Tensor, weight_NK: Tensor, rounding: str) -> Tensor:
    return x_RK.new_empty(x_RK.shape[0], weight_NK.shape[0])


@torch.library.custom_op("dsv3::rounded_linear_backward", mutates_args=())
def _backward(grad_RN: Tensor, x_RK: Tensor, weight_NK: Tensor, rounding: str) -> tuple[Tensor, Tensor]:
    """Return the gradients by x and weight."""
    to = ROUNDINGS[rounding]
    grad_x_RK = to.of_rows(grad_RN) @ to.of_weight(weight_NK)
    return grad_x_RK, to.of_columns(grad_RN).t() @ to.of_columns(x_RK)


@_backward.register_fake
def _(grad_RN: Tensor, x_RK: Tensor, weight_NK: Tensor, rounding: str) -> tuple[Tensor, Tensor]:
    return x_RK.new_empty(x_RK.shape), weight_NK.new_empty(weight_NK.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the unrounded operands."""
    x_RK, weight_NK, ctx.rounding = inputs
    ctx.save_for_backward(x_RK, weight_NK)


def _gradients(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients in the order of `_forward`'s arguments."""
    return (*_backward(grad_RN, *ctx.saved_tensors, ctx.rounding), None)


_forward.register_autograd(_gradients, setup_context=_save)

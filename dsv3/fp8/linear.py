"""Linear layers whose three products (forward, dgrad, wgrad) take low-precision operands.

The layer owns no weights of its own: it holds the very `Parameter` of the layer that it replaces, in high precision.
Optimizer, checkpoints and export see no difference, and a run can change its precision at any checkpoint.

Letters: R rows, I inputs, O outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Operands = list[Tensor]
"""Weights as a product takes them: rounded or quantized, without gradient."""


@dataclass(frozen=True)
class Product:
    """How a linear layer multiplies."""

    weight_operands: Callable[[Tensor], Operands]
    """From the master weight (O, I) to its operands."""
    multiply: Callable[[Tensor, Tensor, Operands], Tensor]
    """From x (R, I), the master weight and its operands to x @ weight.T (R, O), with gradients by the first two."""


class LowPrecisionLinear(nn.Linear):
    """A Linear that multiplies by `product` and shares the parameters of `original`."""

    def __init__(self, original: nn.Linear, product: Product) -> None:
        super().__init__(original.in_features, original.out_features, original.bias is not None, device="meta")
        self.weight, self.bias = original.weight, original.bias
        self.product = product
        self.weight_operands: Operands | None = None
        """Set by `dsv3.kernels.weight_cache.cached_weights` within its block."""

    def new_weight_operands(self) -> Operands:
        """Return the operands of the weight as it is now."""
        return self.product.weight_operands(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Return x @ weight.T + bias in the dtype that autocast asks for, or that of `input`."""
        device = input.device.type
        is_autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_autocast else input.dtype
        with torch.autocast(device, enabled=False):
            operands = self.new_weight_operands() if self.weight_operands is None else self.weight_operands
            output = self.product.multiply(input.reshape(-1, self.in_features), self.weight, operands).to(dtype)
            output = output if self.bias is None else output + self.bias.to(dtype)
        return output.view(*input.shape[:-1], self.out_features)

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
    """How linear layers that read one x multiply."""

    weight_operands: Callable[[list[Tensor]], Operands]
    """From master weights (O, I) to the operands of all of them."""
    multiply: Callable[[Tensor, list[Tensor], Operands], list[Tensor]]
    """From x (R, I), master weights and their operands to each x @ weight.T (R, O), with gradients by x and weights."""


class LowPrecisionLinear(nn.Linear):
    """A Linear that multiplies by `product` and shares the parameters of `original`."""

    def __init__(self, original: nn.Linear, product: Product) -> None:
        super().__init__(original.in_features, original.out_features, original.bias is not None, device="meta")
        self.weight, self.bias = original.weight, original.bias
        self.product = product
        self.cached_operands: Operands | None = None
        """Set by `dsv3.kernels.weight_cache.cached_weights` within its block."""

    def new_weight_operands(self) -> Operands:
        """Return the operands of the weight as it is now."""
        return self.product.weight_operands([self.weight])

    def current_weight_operands(self) -> Operands:
        """Return the cached operands, or new ones."""
        return self.new_weight_operands() if self.cached_operands is None else self.cached_operands

    def forward(self, input: Tensor, output_RO: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias in the dtype that autocast asks for, or that of `input`.

        `output_RO` is x @ weight.T where it was computed together with others.
        """
        device = input.device.type
        is_autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_autocast else input.dtype
        (output_RO,) = products(input, [self]) if output_RO is None else (output_RO,)
        with torch.autocast(device, enabled=False):
            output = output_RO.to(dtype)
            output = output if self.bias is None else output + self.bias.to(dtype)
        return output.view(*input.shape[:-1], self.out_features)


class LowPrecisionMLP(nn.Module):
    """A SwiGLU whose gate and up round their common input once, in the forward and in the backward pass."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.gate_proj: LowPrecisionLinear = original.gate_proj  # pyright: ignore[reportAttributeAccessIssue]
        self.up_proj: LowPrecisionLinear = original.up_proj  # pyright: ignore[reportAttributeAccessIssue]
        self.down_proj: nn.Linear = original.down_proj  # pyright: ignore[reportAttributeAccessIssue]
        self.act_fn: nn.Module = original.act_fn  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output, of `x`'s shape."""
        gate, up = products(x, [self.gate_proj, self.up_proj])
        return self.down_proj(self.act_fn(self.gate_proj(x, gate)) * self.up_proj(x, up))


def products(x: Tensor, layers: list[LowPrecisionLinear]) -> list[Tensor]:
    """Return x @ weight.T (R, O) for each of `layers`, which multiply in the same way."""
    operands = [operand for layer in layers for operand in layer.current_weight_operands()]
    with torch.autocast(x.device.type, enabled=False):
        flat_RI = x.reshape(-1, x.shape[-1])
        return layers[0].product.multiply(flat_RI, [layer.weight for layer in layers], operands)

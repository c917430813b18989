"""Linear layers in emulated precision: operands are rounded, products are fp32.

Letters: R rows, I inputs, O outputs.
"""

import torch
from torch import Tensor

from dsv3.fp8.linear import Operands, Product
from dsv3.fp8.rounding import ROUNDINGS, Rounding
from dsv3.kernels.op import linear_op, op


def product(rounding: Rounding) -> Product:
    """Return the product whose operands are rounded by `rounding`; the gradients' operands likewise."""

    def multiply(x_RI: Tensor, weight_OI: Tensor, operands: Operands) -> Tensor:
        return emulated_linear(x_RI.float(), weight_OI, operands, rounding.name)

    return Product(lambda weight: weight_operands([weight], rounding), multiply)


def weight_operands(weights: list[Tensor], rounding: Rounding) -> Operands:
    """Return the weights, or stacks of weights, as forward and dgrad see them."""
    weights = [weight.detach() for weight in weights]
    return [rounded_weight(weight, rounding.name) for weight in weights] if rounding.weights else weights


def _rounded_weight(weight_OI: Tensor, rounding: str) -> Tensor:
    return ROUNDINGS[rounding].of_weight(weight_OI).contiguous()


def _empty_weight(weight_OI: Tensor, rounding: str) -> Tensor:
    return weight_OI.new_empty(weight_OI.shape, dtype=torch.float32)


def _forward(x_RI: Tensor, weight_OI: Tensor, operands: list[Tensor], rounding: str) -> Tensor:
    """Return the product of the rounded operands."""
    return ROUNDINGS[rounding].of_rows(x_RI) @ operands[0].t()


def _backward(grad_RO: Tensor, x_RI: Tensor, operands: list[Tensor], rounding: str) -> tuple[Tensor, Tensor]:
    """Return the gradients by x and weight."""
    to = ROUNDINGS[rounding]
    return to.of_rows(grad_RO) @ operands[0], to.of_columns(grad_RO).t() @ to.of_columns(x_RI)


rounded_weight = op("rounded_weight", _rounded_weight, _empty_weight)
emulated_linear = linear_op("emulated_linear", _forward, _backward)

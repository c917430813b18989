"""Linear layers in emulated precision: operands are rounded, products are fp32.

Letters: R rows, I inputs, O outputs.
"""

import torch
from torch import Tensor

from dsv3.fp8.linear import Operands, Product
from dsv3.fp8.rounding import ROUNDINGS, Rounding
from dsv3.kernels.op import dgrad_operands, forward_operands, linear_op, op, sum_in_place


def product(rounding: Rounding) -> Product:
    """Return the product whose operands are rounded by `rounding`; the gradients' operands likewise."""

    def multiply(x_RI: Tensor, weights: list[Tensor], operands: Operands) -> list[Tensor]:
        return emulated_linear(x_RI.float(), weights, operands, rounding.name)

    return Product(lambda weights: weight_operands(weights, rounding), multiply)


def weight_operands(weights: list[Tensor], rounding: Rounding) -> Operands:
    """Return the weights, or stacks of weights, as forward and dgrad see them: two of each, where these differ."""
    weights = [weight.detach() for weight in weights]
    if rounding.weights is None:
        return weights
    passes = (False,) if rounding.dgrad_weights is None else (False, True)
    return [rounded_weight_op(weight, rounding.name, is_for_dgrad) for weight in weights for is_for_dgrad in passes]


def _rounded_weight(weight_OI: Tensor, rounding: str, is_for_dgrad: bool) -> Tensor:
    return ROUNDINGS[rounding].of_weight(weight_OI, is_for_dgrad).contiguous()


def _empty_weight(weight_OI: Tensor, rounding: str, is_for_dgrad: bool) -> Tensor:
    return weight_OI.new_empty(weight_OI.shape, dtype=torch.float32)


def _forward(x_RI: Tensor, weights: list[Tensor], operands: list[Tensor], rounding: str) -> list[Tensor]:
    """Return the product of the rounded x with each rounded weight."""
    rows_RI = ROUNDINGS[rounding].of_rows(x_RI)
    return [rows_RI @ weight_OI.t() for weight_OI in forward_operands(operands, len(weights))]


def _backward(grads: list[Tensor], x_RI: Tensor, operands: list[Tensor], rounding: str) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients by x and by each weight."""
    to = ROUNDINGS[rounding]
    columns_RI = to.of_columns(x_RI)
    grad_weights = [to.of_columns(grad_RO).t() @ columns_RI for grad_RO in grads]
    weights = dgrad_operands(operands, len(grads))
    grad_xs = [to.of_rows(grad_RO) @ weight_OI for grad_RO, weight_OI in zip(grads, weights, strict=True)]
    return sum_in_place(grad_xs), grad_weights


rounded_weight_op = op("rounded_weight", _rounded_weight, _empty_weight)
emulated_linear = linear_op("emulated_linear", _forward, _backward)

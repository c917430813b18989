"""Linear layers whose three products run in FP8 on the GPU: the grouped kernels with one group.

Letters: R rows, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.fp8.definition import BLOCK
from dsv3.fp8.linear import Operands, Product
from dsv3.fp8.quantize import Quantized
from dsv3.fp8.recipe import RECIPES, Recipe
from dsv3.kernels.op import linear_op, op
from dsv3.kernels.triton_launch import (
    Schedule,
    grouped_gemm,
    grouped_wgrad,
    quantize_columns,
    quantize_rows,
    quantize_weight,
    schedule,
)


def product(recipe: Recipe) -> Product:
    """Return the product by `recipe`, in the dtype of x; dimensions are padded to multiples of 128."""

    def multiply(x_RI: Tensor, weight_OI: Tensor, operands: Operands) -> Tensor:
        return linear_triton(x_RI, weight_OI, operands, recipe.name)

    return Product(lambda weight: weight_operands([weight], recipe), multiply)


def weight_operands(weights: list[Tensor], recipe: Recipe) -> Operands:
    """Return of each weight, or stack of weights, e4m3 numbers, as bytes, and scales, and both transposed."""
    return [part for weight in weights for part in quantized_weight(weight.detach(), recipe.power_of_two_scales)]


def forward_operand(operands: Operands, number: int = 0) -> Quantized:
    """Return the quantized weight of that number, as forward takes it."""
    return _quantized(*operands[4 * number : 4 * number + 2])


def dgrad_operand(operands: Operands, number: int = 0) -> Quantized:
    """Return the quantized weight of that number, transposed, as dgrad takes it."""
    return _quantized(*operands[4 * number + 2 : 4 * number + 4])


def _quantized(values: Tensor, scales: Tensor) -> Quantized:
    return Quantized(values.view(torch.float8_e4m3fn), scales)


def padded(x: Tensor, num_dims: int) -> Tensor:
    """Return `x`, contiguous, with its last dimensions padded by zeros to multiples of 128."""
    gaps = [-size % BLOCK for size in reversed(x.shape[-num_dims:])]
    return F.pad(x, [side for gap in gaps for side in (0, gap)]) if any(gaps) else x.contiguous()


def whole_schedule(x_RI: Tensor) -> Schedule:
    """Return the tiles of rows that all belong to one expert."""
    return schedule(torch.full((1,), len(x_RI), dtype=torch.int32, device=x_RI.device), len(x_RI))


def _quantized_weight(weight_OI: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stack = weight_OI if weight_OI.dim() == 3 else weight_OI[None]
    forward, transposed = quantize_weight(padded(stack, 2), power_of_two_scales)
    # Bytes, because torch's checks of an operator can't compare e4m3 numbers.
    return forward.values.view(torch.uint8), forward.scales, transposed.values.view(torch.uint8), transposed.scales


def _empty_weight(weight_OI: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_experts = weight_OI.shape[0] if weight_OI.dim() == 3 else 1
    output_blocks, input_blocks = (-(-size // BLOCK) for size in weight_OI.shape[-2:])

    def empty(*blocks: int) -> tuple[Tensor, Tensor]:
        values = weight_OI.new_empty(num_experts, *(BLOCK * size for size in blocks), dtype=torch.uint8)
        return values, weight_OI.new_empty(num_experts, *blocks, dtype=torch.float32)

    return *empty(output_blocks, input_blocks), *empty(input_blocks, output_blocks)


def _forward(x_RI: Tensor, weight_OI: Tensor, operands: list[Tensor], recipe: str) -> Tensor:
    """Return the product of the quantized operands."""
    rows = quantize_rows(padded(x_RI, 1), RECIPES[recipe].power_of_two_scales)
    y_RO = grouped_gemm(rows, None, forward_operand(operands), whole_schedule(x_RI), len(x_RI), x_RI.dtype)
    return y_RO[:, : len(weight_OI)].contiguous()


def _backward(grad_RO: Tensor, x_RI: Tensor, operands: list[Tensor], recipe: str) -> tuple[Tensor, Tensor]:
    """Return the gradients by x, in its dtype, and by the master weight, in fp32."""
    choice, num_outputs, num_inputs = RECIPES[recipe], grad_RO.shape[1], x_RI.shape[1]
    tiles, grad, x = whole_schedule(x_RI), padded(grad_RO, 1), padded(x_RI, 1)
    rows = quantize_rows(grad, choice.power_of_two_scales)
    grad_x_RI = grouped_gemm(rows, None, dgrad_operand(operands), tiles, len(x), x.dtype)[:, :num_inputs]
    if not choice.wgrad_quant:
        return grad_x_RI.contiguous(), (grad_RO.bfloat16().t() @ x_RI.bfloat16()).float()
    grad_OR, x_IR = (quantize_columns(side, tiles, None, choice.power_of_two_scales) for side in (grad, x))
    grad_weight_OI = grouped_wgrad(grad_OR, x_IR, tiles, torch.float32)[0, :num_outputs, :num_inputs]
    return grad_x_RI.contiguous(), grad_weight_OI.contiguous()


quantized_weight = op("quantized_weight", _quantized_weight, _empty_weight)
linear_triton = linear_op("linear_triton", _forward, _backward)

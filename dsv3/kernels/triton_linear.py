"""Linear layers whose three products run in FP8 on the GPU: the grouped kernels with one group, or cuBLAS.

Letters: R rows, I inputs, O outputs.
"""

from functools import lru_cache

import torch
from torch import Tensor

from dsv3.fp8.definition import BLOCK
from dsv3.fp8.linear import Operands, Product
from dsv3.fp8.quantize import Quantized, padded
from dsv3.fp8.recipe import RECIPES, Recipe
from dsv3.kernels.dense_gemm import dense_gemm, dense_wgrad
from dsv3.kernels.op import linear_op, op, sum_in_place
from dsv3.kernels.triton_launch import (
    Schedule,
    quantize_columns,
    quantize_rows,
    quantize_weight,
    schedule,
)


def product(recipe: Recipe) -> Product:
    """Return the product by `recipe`, in the dtype of x; dimensions are padded to multiples of 128."""

    def multiply(x_RI: Tensor, weights: list[Tensor], operands: Operands) -> list[Tensor]:
        return linear_triton(x_RI, weights, operands, recipe.name)

    return Product(lambda weights: weight_operands(weights, recipe), multiply)


def weight_operands(weights: list[Tensor], recipe: Recipe) -> Operands:
    """Return of each weight, or stack of weights, e4m3 numbers, as bytes, and scales, and both transposed."""
    return [part for weight in weights for part in quantized_weight_op(weight.detach(), recipe.power_of_two_scales)]


def forward_operand(operands: Operands, number: int) -> Quantized:
    """Return the quantized weight of that number, as forward takes it."""
    return _quantized(*operands[4 * number : 4 * number + 2])


def dgrad_operand(operands: Operands, number: int) -> Quantized:
    """Return the quantized weight of that number, transposed, as dgrad takes it."""
    return _quantized(*operands[4 * number + 2 : 4 * number + 4])


def _quantized(values: Tensor, scales: Tensor) -> Quantized:
    return Quantized(values.view(torch.float8_e4m3fn), scales)


@lru_cache(maxsize=256)
def whole_schedule(num_rows: int, device: torch.device) -> Schedule:
    """Return the tiles of rows that all belong to one expert: constants, which 22 small launches make."""
    return schedule(torch.full((1,), num_rows, dtype=torch.int32, device=device), num_rows)


def _quantized_weight(weight_OI: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stack = weight_OI if weight_OI.dim() == 3 else weight_OI[None]
    forward, transposed = quantize_weight(padded(stack, 2).contiguous(), power_of_two_scales)
    # Bytes, because torch's checks of an operator can't compare e4m3 numbers.
    return forward.values.view(torch.uint8), forward.scales, transposed.values.view(torch.uint8), transposed.scales


def _empty_weight(weight_OI: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_experts = weight_OI.shape[0] if weight_OI.dim() == 3 else 1
    output_blocks, input_blocks = (-(-size // BLOCK) for size in weight_OI.shape[-2:])

    def empty(*blocks: int) -> tuple[Tensor, Tensor]:
        values = weight_OI.new_empty(num_experts, *(BLOCK * size for size in blocks), dtype=torch.uint8)
        return values, weight_OI.new_empty(num_experts, *blocks, dtype=torch.float32)

    return *empty(output_blocks, input_blocks), *empty(input_blocks, output_blocks)


def _forward(x_RI: Tensor, weights: list[Tensor], operands: list[Tensor], recipe: str) -> list[Tensor]:
    """Return the product of the quantized x with each quantized weight."""
    tiles = whole_schedule(len(x_RI), x_RI.device)
    rows = quantize_rows(padded(x_RI, 1).contiguous(), RECIPES[recipe].power_of_two_scales)
    products = []
    for number, weight_OI in enumerate(weights):
        y_RO = dense_gemm(rows, forward_operand(operands, number), tiles, x_RI.dtype)
        products.append(y_RO[:, : len(weight_OI)].contiguous())
    return products


def _backward(grads: list[Tensor], x_RI: Tensor, operands: list[Tensor], recipe: str) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients by x, in its dtype, and by each master weight, in fp32."""
    choice, tiles, num_inputs = RECIPES[recipe], whole_schedule(len(x_RI), x_RI.device), x_RI.shape[1]
    scales = choice.power_of_two_scales
    x_IR = quantize_columns(padded(x_RI, 1).contiguous(), tiles, None, scales) if choice.wgrad_quant else None
    grad_xs, grad_weights = [], []
    for number, grad_RO in enumerate(grads):
        grad = padded(grad_RO, 1).contiguous()
        rows = quantize_rows(grad, scales)
        grad_x_RI = dense_gemm(rows, dgrad_operand(operands, number), tiles, x_RI.dtype)
        grad_xs.append(grad_x_RI[:, :num_inputs].contiguous())
        if x_IR is None:
            grad_weights.append((grad_RO.bfloat16().t() @ x_RI.bfloat16()).float())
            continue
        grad_OI = dense_wgrad(quantize_columns(grad, tiles, None, scales), x_IR, tiles, len(x_RI))
        grad_weights.append(grad_OI[: grad_RO.shape[1], :num_inputs].contiguous())
    return sum_in_place(grad_xs), grad_weights


quantized_weight_op = op("quantized_weight", _quantized_weight, _empty_weight)
linear_triton = linear_op("linear_triton", _forward, _backward)

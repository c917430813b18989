"""A tensor kept for the backward pass, as it is or in FP8.

The report (section 3.3.3) caches the inputs of SwiGLU in FP8 and computes its output from them again. The forward pass
goes on with the unrounded numbers, so the loss does not change; the gradients see numbers that e4m3 has moved by up to
2^-4 of themselves. In return a number takes 1 + 4 / 128 bytes instead of 4 or 2.

An operator of torch.library returns a fixed number of tensors: what is kept is always a pair, whose second part is
empty where nothing is quantized.

Letters: R rows, W columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3.fp8.definition import BLOCK
from dsv3.fp8.quantize import Quantized

Quantizer = Callable[[Tensor], Quantized]
"""From rows (R, W) to e4m3 numbers and scales in 1x128 blocks, W rounded up to whole blocks."""


def packed(x_RW: Tensor, quantizer: Quantizer | None) -> tuple[Tensor, Tensor]:
    """Return `x_RW` and nothing, or its e4m3 numbers, as bytes, and their scales."""
    if quantizer is None:
        return x_RW, x_RW.new_empty(0, dtype=torch.float32)
    blocks = quantizer(x_RW)
    return blocks.values.view(torch.uint8), blocks.scales  # bytes: autograd makes zero gradients for floating outputs


def empty_packed(like: Tensor, shape: tuple[int, int], is_quantized: bool) -> tuple[Tensor, Tensor]:
    """Return empty tensors of the shapes and dtypes that `packed` gives for a tensor of `shape` and `like`'s dtype."""
    num_rows, num_columns = shape
    if not is_quantized:
        return like.new_empty(shape), like.new_empty(0, dtype=torch.float32)
    num_blocks = -(-num_columns // BLOCK)
    values = like.new_empty(num_rows, num_blocks * BLOCK, dtype=torch.uint8)
    return values, like.new_empty(num_rows, num_blocks, dtype=torch.float32)


def unpacked(packed_RW: Tensor, scales: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    """Return what `packed` was given, (R, num_columns), from the two tensors that it gave, or from rows of both."""
    if packed_RW.dtype != torch.uint8:
        return packed_RW
    blocks = packed_RW.view(torch.float8_e4m3fn).float().view(*scales.shape, BLOCK)
    return blocks.mul_(scales[..., None]).view(packed_RW.shape)[:, :num_columns].to(dtype)

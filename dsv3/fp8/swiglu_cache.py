"""A tensor that waits for the backward pass, as it is or in FP8.

The report (section 3.3.3) caches the inputs of SwiGLU in FP8 and computes its output from them again. The forward pass
goes on with the unrounded numbers, so the loss does not change; the gradients see numbers that e4m3 has moved by up to
2^-4 of themselves. In return a number takes 1 + 4 / 128 bytes instead of 4 or 2.

An operator of torch.library returns a fixed number of tensors: what waits is always a pair, whose second part is empty
where nothing is quantised.

Letters: R rows, C columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3.fp8.definition import BLOCK
from dsv3.fp8.quantize import Quantised

Quantiser = Callable[[Tensor], Quantised]
"""From rows (R, C) to e4m3 numbers and scales in 1x128 blocks, C rounded up to whole blocks."""


def kept(x_RC: Tensor, quantiser: Quantiser | None) -> tuple[Tensor, Tensor]:
    """Return `x_RC` and nothing, or its e4m3 numbers, as bytes, and their scales."""
    if quantiser is None:
        return x_RC, x_RC.new_empty(0, dtype=torch.float32)
    blocks = quantiser(x_RC)
    return blocks.values.view(torch.uint8), blocks.scales  # bytes: autograd makes zero gradients for floating outputs


def fake_kept(like: Tensor, shape: tuple[int, int], is_quantised: bool) -> tuple[Tensor, Tensor]:
    """Return tensors of the shapes and dtypes that `kept` gives for a tensor of `shape` and `like`'s dtype."""
    num_rows, num_columns = shape
    if not is_quantised:
        return like.new_empty(shape), like.new_empty(0, dtype=torch.float32)
    num_blocks = -(-num_columns // BLOCK)
    values = like.new_empty(num_rows, num_blocks * BLOCK, dtype=torch.uint8)
    return values, like.new_empty(num_rows, num_blocks, dtype=torch.float32)


def restored(kept_RC: Tensor, scales: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    """Return what `kept` was given, (R, num_columns), from the two tensors that it gave, or from rows of both."""
    if kept_RC.dtype != torch.uint8:
        return kept_RC
    blocks = kept_RC.view(torch.float8_e4m3fn).float().view(*scales.shape, BLOCK)
    return blocks.mul_(scales[..., None]).view(kept_RC.shape)[:, :num_columns].to(dtype)

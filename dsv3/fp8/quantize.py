"""Block-scaled FP8 in torch: the quantisers, and what their results stand for.

Three shapes of block (report, section 3.3.2; numbers as in `dsv3.fp8.definition`):

    rows      1 x 128     activations and gradients, along the inner dimension of forward and dgrad
    columns   128 x 1     the same tensors for wgrad, whose inner dimension is the tokens (of one expert)
    weights   128 x 128   so that one quantised weight serves forward and, transposed, dgrad

Each comes twice. `quantised_*` returns the stored form, e4m3 numbers and scales: what a checkpoint export writes and
what the Triton kernels are compared with. `rounded_*` returns the fp32 values which that form stands for, computed
without leaving fp32: the emulation multiplies them and sees what an FP8 GPU sees. It is several times faster, because
torch's conversion from e4m3 on a CPU is a scalar loop; the tests hold the two to equal bits.

Dimensions that are no multiple of 128 end in a smaller block, which is the same as padding with zeros.

Letters: R rows, C columns, N outputs, K inputs of a weight, D any leading dimensions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.fp8.definition import AMAX_FLOOR, BLOCK, E4M3_MAX

CHUNK_NUMBERS = 1 << 18
"""Numbers rounded at a time: with their scratch copy they fit the second-level caches of two cores."""
EXPONENT_BITS = 0x7F800000
SMALLEST_EXPONENT = (127 - 6) << 23
SHIFT_TO_MAGIC = (20 << 23) + (1 << 22)


class Quantised(NamedTuple):
    """The stored form of a tensor."""

    values: Tensor
    """e4m3 numbers."""
    scales: Tensor
    """fp32, one per block."""


def scale_and_inverse(amax: Tensor, has_power_of_two_scales: bool = False) -> tuple[Tensor, Tensor]:
    """Return the scales of blocks with largest magnitudes `amax`, and what their numbers are multiplied by."""
    amax = amax.clamp_min(AMAX_FLOOR)
    largest = torch.full_like(amax, E4M3_MAX)  # with a Python number torch multiplies by a reciprocal: rounded twice
    scale = amax / largest
    if not has_power_of_two_scales:
        return scale, largest / amax
    is_finite = scale.isfinite()
    next_power = ((scale.view(torch.int32) + 0x7FFFFF) & EXPONENT_BITS).view(torch.float32)
    scale = torch.where(is_finite, next_power, scale)
    return scale, 1 / scale


def round_to_e4m3_(y: Tensor, scratch: Tensor) -> Tensor:
    """Round fp32 numbers of magnitude < 464 to e4m3 in place, ties to even; NaN stays NaN. Overwrites `scratch`.

    Adding and subtracting 1.5 * 2^(e + 20), with e the exponent of y (at least -6), leaves the multiples of 2^(e - 3):
    fp32 has 23 mantissa bits, e4m3 has 3, and the fp32 addition does the rounding.
    """
    bits = torch.bitwise_and(y.view(torch.int32), EXPONENT_BITS, out=scratch.view(torch.int32))
    magic = bits.clamp_min_(SMALLEST_EXPONENT).add_(SHIFT_TO_MAGIC).view(torch.float32)
    return y.add_(magic).sub_(magic)


def _round_blocks(x: Tensor, dim: int | tuple[int, ...], pow2: bool, out: Tensor) -> None:
    """Write the values of `x`, whose blocks extend along `dim`, to `out`, a chunk of the first dimension at a time."""
    step = max(1, CHUNK_NUMBERS * len(x) // max(1, x.numel()))
    scratch = torch.empty_like(out[:step])
    for chunk, rounded in zip(x.split(step), out.split(step), strict=True):
        room = scratch[: len(chunk)]
        amax = torch.abs(chunk, out=room).amax(dim, keepdim=True)
        scale, inverse = scale_and_inverse(amax, pow2)
        torch.mul(chunk, inverse, out=rounded)
        round_to_e4m3_(rounded, room).mul_(scale)


def rounded_rows(x_DC: Tensor, pow2: bool = False) -> Tensor:
    """Return the fp32 values that `x_DC` has once quantised in 1x128 blocks along its last dimension."""
    num_columns = x_DC.shape[-1]
    padded = _padded(x_DC.float(), 1)
    blocks = padded.reshape(-1, BLOCK)
    out = torch.empty_like(blocks)
    _round_blocks(blocks, 1, pow2, out)
    return out.view(padded.shape)[..., :num_columns]


def rounded_columns(x_RC: Tensor, pow2: bool = False) -> Tensor:
    """Return the fp32 values that `x_RC` has once quantised in 128x1 blocks; the last block may be shorter."""
    num_rows, num_columns = x_RC.shape
    x_RC = x_RC.float().contiguous()
    out = torch.empty_like(x_RC)
    whole = num_rows // BLOCK * BLOCK
    if whole:
        shape = (-1, BLOCK, num_columns)
        _round_blocks(x_RC[:whole].view(shape), 1, pow2, out[:whole].view(shape))
    if whole < num_rows:
        _round_blocks(x_RC[None, whole:], 1, pow2, out[None, whole:])
    return out


def rounded_weight(w_DNK: Tensor, pow2: bool = False) -> Tensor:
    """Return the fp32 values that `w_DNK` has once quantised in 128x128 blocks of its last two dimensions."""
    num_outputs, num_inputs = w_DNK.shape[-2:]
    padded = _padded(w_DNK.float(), 2)
    blocks = padded.reshape(-1, BLOCK, padded.shape[-1] // BLOCK, BLOCK)
    out = torch.empty_like(blocks)
    _round_blocks(blocks, (1, 3), pow2, out)
    return out.view(padded.shape)[..., :num_outputs, :num_inputs]


def quantised_rows(x_RC: Tensor, pow2: bool = False) -> Quantised:
    """Return e4m3 numbers (R, C) and scales (R, C / 128), C rounded up to whole blocks."""
    padded = _padded(x_RC.float(), 1)
    blocks = padded.view(len(x_RC), padded.shape[1] // BLOCK, BLOCK)
    scale, inverse = scale_and_inverse(blocks.abs().amax(-1), pow2)
    return Quantised(_stored(blocks * inverse[..., None]).view(padded.shape), scale)


def quantised_weight(w_NK: Tensor, pow2: bool = False) -> Quantised:
    """Return e4m3 numbers (N, K) and scales (N / 128, K / 128), both dimensions rounded up to whole blocks."""
    padded = _padded(w_NK.float(), 2)
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale, inverse = scale_and_inverse(blocks.abs().amax((1, 3)), pow2)
    return Quantised(_stored(blocks * inverse[:, None, :, None]).view(padded.shape), scale)


def quantised_columns(x_RC: Tensor, pow2: bool = False) -> Quantised:
    """Return e4m3 numbers (C, R) and scales (C, R / 128), R rounded up to whole blocks: the transpose, by rows."""
    return quantised_rows(x_RC.t().contiguous(), pow2)


def dequantised(blocks: Quantised, block_shape: tuple[int, int]) -> Tensor:
    """Return the fp32 values of a stored 2-d form whose blocks have `block_shape`."""
    scales = blocks.scales.repeat_interleave(block_shape[0], 0).repeat_interleave(block_shape[1], 1)
    return blocks.values.float() * scales


def _stored(y: Tensor) -> Tensor:
    """Return `y` as e4m3 numbers."""
    return y.to(torch.float8_e4m3fn)


def _padded(x: Tensor, num_dims: int) -> Tensor:
    """Return `x` with its last `num_dims` dimensions padded by zeros to whole blocks."""
    gaps = [-size % BLOCK for size in reversed(x.shape[-num_dims:])]
    return F.pad(x, [side for gap in gaps for side in (0, gap)]) if any(gaps) else x

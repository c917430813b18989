"""Block-scaled FP8 in torch: the quantizers, and the values of what they store.

Three shapes of block (report, section 3.3.2; numbers as in `dsv3.fp8.definition`):

    rows      1 x 128     activations and gradients, along the inner dimension of forward and dgrad
    columns   128 x 1     the same tensors for wgrad, whose inner dimension is the tokens (of one expert)
    weights   128 x 128   so that one quantized weight serves forward and, transposed, dgrad

Each comes twice. `quantized_*` returns the stored form, e4m3 numbers and scales: what a checkpoint export writes and
what the Triton kernels are compared with. `rounded_*` returns the fp32 values which that form stands for, computed
without leaving fp32: the emulation multiplies them and sees what an FP8 GPU sees. It is several times faster, because
torch's conversion from e4m3 on a CPU is a scalar loop; the tests hold the two to equal bits.

Dimensions that are no multiple of 128 end in a smaller block, which is the same as padding with zeros.

MXFP8 has rows and columns of 32. Its weights are rows, too: along the inputs for forward, along the outputs for dgrad.

Letters: R rows, W columns, O outputs, I inputs.
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
SHIFT = 1.5 * 2.0**20


class Quantized(NamedTuple):
    """The stored form of a tensor."""

    values: Tensor
    """e4m3 numbers."""
    scales: Tensor
    """fp32, one per block."""


def scale_and_inverse(amax: Tensor, power_of_two_scales: bool = False) -> tuple[Tensor, Tensor]:
    """Return the scales of blocks with largest magnitudes `amax`, and what their numbers are multiplied by."""
    amax = amax.clamp_min(AMAX_FLOOR)
    largest = torch.full_like(amax, E4M3_MAX)  # with a Python number torch multiplies by a reciprocal: rounded twice
    scale = amax / largest
    if not power_of_two_scales:
        return scale, largest / amax
    is_finite = scale.isfinite()
    next_power = ((scale.view(torch.int32) + 0x7FFFFF) & EXPONENT_BITS).view(torch.float32)
    scale = torch.where(is_finite, next_power, scale)
    return scale, 1 / scale


def round_to_e4m3_(y: Tensor, scratch: Tensor) -> Tensor:
    """Round fp32 numbers of magnitude < 464 to e4m3 in place, ties to even; NaN stays NaN. Overwrites `scratch`.

    Adding and subtracting 1.5 * 2^(e + 20), with e the exponent of y (at least -6), leaves the multiples of 2^(e - 3):
    fp32 has 23 mantissa bits, e4m3 has 3, and the fp32 addition does the rounding. The factor of a power of two is
    exact, so a fused multiply-add gives the same.
    """
    torch.bitwise_and(y.view(torch.int32), EXPONENT_BITS, out=scratch.view(torch.int32)).clamp_min_(SMALLEST_EXPONENT)
    return y.add_(scratch, alpha=SHIFT).sub_(scratch, alpha=SHIFT)


def padded(x: Tensor, num_dims: int, block: int = BLOCK) -> Tensor:
    """Return `x` with its last `num_dims` dimensions padded by zeros to whole blocks."""
    gaps = [-size % block for size in reversed(x.shape[-num_dims:])]
    return F.pad(x, [side for gap in gaps for side in (0, gap)]) if any(gaps) else x


def _round_blocks(x: Tensor, dim: int | tuple[int, ...], power_of_two_scales: bool, out: Tensor) -> None:
    """Write the values of `x`, whose blocks extend along `dim`, to `out`, a chunk of the first dimension at a time."""
    step = max(1, CHUNK_NUMBERS * len(x) // max(1, x.numel()))
    scratch = torch.empty_like(out[:step])
    for chunk, rounded in zip(x.split(step), out.split(step), strict=True):
        room = scratch[: len(chunk)]
        amax = torch.abs(chunk, out=room).amax(dim, keepdim=True)
        scale, inverse = scale_and_inverse(amax, power_of_two_scales)
        torch.mul(chunk, inverse, out=rounded)
        round_to_e4m3_(rounded, room).mul_(scale)


def rounded_rows(x_W: Tensor, power_of_two_scales: bool = False, block: int = BLOCK) -> Tensor:
    """Return the fp32 values that `x_W` has once quantized in blocks along its last dimension."""
    num_columns = x_W.shape[-1]
    whole_blocks = padded(x_W.float(), 1, block)
    blocks = whole_blocks.reshape(-1, block)
    out = torch.empty_like(blocks)
    _round_blocks(blocks, 1, power_of_two_scales, out)
    return out.view(whole_blocks.shape)[..., :num_columns]


def rounded_columns(x_RW: Tensor, power_of_two_scales: bool = False, block: int = BLOCK) -> Tensor:
    """Return the fp32 values that `x_RW` has once quantized in blocks along its rows; the last may be shorter."""
    num_rows, num_columns = x_RW.shape
    x_RW = x_RW.float().contiguous()
    out = torch.empty_like(x_RW)
    whole = num_rows // block * block
    if whole:
        shape = (-1, block, num_columns)
        _round_blocks(x_RW[:whole].view(shape), 1, power_of_two_scales, out[:whole].view(shape))
    if whole < num_rows:
        _round_blocks(x_RW[None, whole:], 1, power_of_two_scales, out[None, whole:])
    return out


def rounded_weight(w_OI: Tensor, power_of_two_scales: bool = False) -> Tensor:
    """Return the fp32 values that `w_OI`, or a stack of weights, has once quantized in 128x128 blocks."""
    num_outputs, num_inputs = w_OI.shape[-2:]
    whole_blocks = padded(w_OI.float(), 2)
    blocks = whole_blocks.reshape(-1, BLOCK, whole_blocks.shape[-1] // BLOCK, BLOCK)
    out = torch.empty_like(blocks)
    _round_blocks(blocks, (1, 3), power_of_two_scales, out)
    return out.view(whole_blocks.shape)[..., :num_outputs, :num_inputs]


def quantized_rows(x_RW: Tensor, power_of_two_scales: bool = False, block: int = BLOCK) -> Quantized:
    """Return e4m3 numbers (R, W) and scales (R, W / block), W rounded up to whole blocks."""
    whole_blocks = padded(x_RW.float(), 1, block)
    blocks = whole_blocks.view(len(x_RW), whole_blocks.shape[1] // block, block)
    scale, inverse = scale_and_inverse(blocks.abs().amax(-1), power_of_two_scales)
    return Quantized(_to_e4m3(blocks * inverse[..., None]).view(whole_blocks.shape), scale)


def rounded_along_outputs(w_OI: Tensor, power_of_two_scales: bool = False, block: int = BLOCK) -> Tensor:
    """Return the fp32 values that `w_OI`, or a stack of weights, has once quantized in blocks along its outputs."""
    return rounded_rows(w_OI.mT, power_of_two_scales, block).mT


def quantized_weight(w_OI: Tensor, power_of_two_scales: bool = False) -> Quantized:
    """Return e4m3 numbers (O, I) and scales (O / 128, I / 128), both dimensions rounded up to whole blocks."""
    whole_blocks = padded(w_OI.float(), 2)
    blocks = whole_blocks.view(whole_blocks.shape[0] // BLOCK, BLOCK, whole_blocks.shape[1] // BLOCK, BLOCK)
    scale, inverse = scale_and_inverse(blocks.abs().amax((1, 3)), power_of_two_scales)
    return Quantized(_to_e4m3(blocks * inverse[:, None, :, None]).view(whole_blocks.shape), scale)


def quantized_columns(x_RW: Tensor, power_of_two_scales: bool = False) -> Quantized:
    """Return e4m3 numbers (W, R) and scales (W, R / 128), R rounded up to whole blocks: the transpose, by rows."""
    return quantized_rows(x_RW.t().contiguous(), power_of_two_scales)


def dequantized(blocks: Quantized, block_shape: tuple[int, int]) -> Tensor:
    """Return the fp32 values of a stored 2-d form whose blocks have `block_shape`."""
    scales = blocks.scales.repeat_interleave(block_shape[0], 0).repeat_interleave(block_shape[1], 1)
    return blocks.values.float() * scales


def _to_e4m3(y: Tensor) -> Tensor:
    """Return `y` as e4m3 numbers."""
    return y.to(torch.float8_e4m3fn)

"""What an FP8 number and its scale are, one scalar at a time in float64.

Every implementation is held to this definition by the tests.

e4m3 (the "fn" form): a sign, four exponent bits with bias 7, three mantissa bits. The largest number is 448, the
smallest normal one 2^-6, and below it the numbers are multiples of 2^-9. There is no infinity; one pattern is NaN.

A block of numbers shares one fp32 scale s. With a the largest magnitude in the block, but at least 2^-100:

    s = fl(a / 448)        inverse = fl(448 / a)        stored = e4m3(fl(x * inverse))        value = fl(stored * s)

where fl rounds to fp32 and e4m3 rounds to nearest, ties to even. Why so:

* Two divisions per block and one product per number. Triton compiles fp32 division to an approximation unless told
  otherwise; products are exact to the last bit everywhere.
* |x * inverse| exceeds 448 by two units in the last place at most, and everything below 464 rounds to 448: no clamp.
* The floor keeps scale and inverse normal numbers. A block of zeros has scale 2^-100 / 448 and stores zeros; a block
  below the floor loses its smallest numbers. DeepSeek's inference code has its floor at 1e-4, which suits
  activations; the gradients of a mean over 10^6 tokens lie below it.
* A NaN or an infinity makes every value of its block NaN (the scale is NaN or infinite): an overflow must show in the
  loss, not turn into 448.
* Power-of-two scales round s up to the next power of two; the inverse is then exact.

MXFP8 (OCP Microscaling Formats 1.0; what Blackwell's tensor cores multiply) is the same with blocks of 32 numbers,
which always lie along the inner dimension, and power-of-two scales, stored as their exponent in one byte (E8M0). The
specification rounds scales down, so that the largest numbers saturate; here they are rounded up, as NVIDIA's recipe for
training does (arXiv 2506.08027), and nothing saturates.
"""

import math
import struct

E4M3_MAX = 448.0
BLOCK = 128
MX_BLOCK = 32
AMAX_FLOOR = 2.0**-100


def fp32(value: float) -> float:
    """Return `value` rounded to fp32; beyond its range, infinity."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def e4m3(value: float) -> float:
    """Return `value` rounded to e4m3, ties to even; NaN stays NaN, magnitudes above 448 become 448."""
    if math.isnan(value):
        return value
    if math.isinf(value):
        return math.copysign(E4M3_MAX, value)
    exponent = max(math.frexp(value)[1] - 1, -6)
    spacing = 2.0 ** (exponent - 3)
    return math.copysign(min(round(abs(value) / spacing) * spacing, E4M3_MAX), value)  # round() ties to even


def scale_and_inverse(amax: float, power_of_two_scales: bool = False) -> tuple[float, float]:
    """Return the scale of a block with largest magnitude `amax`, and what its numbers are multiplied by."""
    if math.isnan(amax):
        return math.nan, math.nan
    if math.isinf(amax):
        return math.inf, 0.0
    amax = max(amax, AMAX_FLOOR)
    scale = fp32(amax / E4M3_MAX)
    if not power_of_two_scales:
        return scale, fp32(E4M3_MAX / amax)
    mantissa, exponent = math.frexp(scale)
    scale = 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)
    return scale, 1 / scale


def quantized_block(values: list[float], power_of_two_scales: bool = False) -> tuple[list[float], float]:
    """Return the e4m3 numbers that store one block of fp32 `values`, and their scale."""
    amax = math.nan if any(map(math.isnan, values)) else max(map(abs, values))
    scale, inverse = scale_and_inverse(amax, power_of_two_scales)
    return [e4m3(fp32(value * inverse)) for value in values], scale

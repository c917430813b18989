"""Makes Triton's interpreter round as a GPU does; for tests only.

Interpreted, a cast from fp32 to a narrower float loses the carry of the mantissa (31.05 becomes 16 instead of 32 in
e4m3), breaks ties upwards, and does not saturate (triton 3.7.1; triton-lang/triton#11584 is about a neighbouring
fault). Here every cast between floats goes through torch, whose rounding is to nearest, ties to even. For e4m3 values
are clamped first, which is what the GPU's saturating conversion does. It replaces a private function: the version of
triton is pinned.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}


def cast(bits: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: object = None) -> np.ndarray:
    """Return the bit patterns of floats of type `source`, cast to `target`."""
    size = source.primitive_bitwidth // 8
    integers = np.ascontiguousarray(bits).view(f"i{size}").reshape(-1)
    values = torch.from_numpy(integers.copy()).view(TORCH[source])
    if target is tl.float8e4nv:
        values = values.float().clamp(-448, 448)  # NaN stays NaN
    size = target.primitive_bitwidth // 8
    result = values.to(TORCH[target]).view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size])
    return result.numpy().view(f"u{size}").reshape(bits.shape)


def install() -> None:
    """Replace the interpreter's cast."""
    interpreter._convert_float = cast

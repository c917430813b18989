# ruff: noqa: ANN001, ANN201, ANN202, PLR0913
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportMissingParameterType=false, reportGeneralTypeIssues=false
# (Triton's language only looks like Python: arguments are pointers, and constants are types.)
"""Block-scaled FP8 in Triton: three quantizers and two grouped GEMMs (report, section 3.3).

Rows come sorted by expert. One `Schedule` cuts each expert's rows into tiles of 128 and is shared by everything that a
layer launches: a program loads its expert and its first row instead of searching for them, and tile number b is also
block number b of the column quantizer, whose output leaves a gap at the end of an expert whose last tile is not full.
Grids have an upper bound (rows / 128 + experts), so nothing waits for the device; programs past the last tile return.

Both GEMMs take one product of 128 inner elements at a time from the tensor cores and add it, scaled, to an fp32
accumulator in registers: Hopper's FP8 tensor cores add with about 14 bits, too few for a long sum. FP8 instructions
want both operands contiguous along the inner dimension, which is why the weight quantizer writes the transpose, too
(for dgrad), and the column quantizer writes tokens contiguously (for wgrad).

The transpose is not made of the block in registers, which would be the obvious way: what Triton 3.6.0 and 3.7.1 compile
a `tl.trans` of a 128x128 tile followed by a store to gives wrong numbers in 37 % of the places on an H100 (the
interpreter and the generated code's shape look right, and 128x32 is right). The block is read a second time instead,
with its axes exchanged; it still lies in the cache, and the time is the same to a percent.

Programs run roughly in the order of their number, 132 at a time. All output blocks of eight tiles come before the next
eight tiles, so that those which run together share rows and weights in the second-level cache.

The permutation is fused: GEMM and column quantizer read row `index[r]` where they are given an index, so activations
are never copied into expert order.

Largest magnitudes are compared as integers: for the bit patterns of non-negative floats that order is the same, and a
NaN is larger than anything, so it reaches the scale (numbers as in `dsv3.fp8.definition`).

Numbers are rounded to e4m3 in fp32 arithmetic; the conversion that follows is exact and can't differ between devices
(Ada's goes through fp16). This holds only if a product and a sum are not fused into one instruction.

Shapes in the docstrings: R rows, A assignments, E n_routed_experts, O outputs, I inputs, Q blocks.
"""

import triton
import triton.language as tl

BLOCK: tl.constexpr = tl.constexpr(128)
TILES_TOGETHER: tl.constexpr = tl.constexpr(8)
E4M3_MAX: tl.constexpr = tl.constexpr(448.0)
AMAX_FLOOR_BITS: tl.constexpr = tl.constexpr(27 << 23)  # 2^-100
SMALLEST_EXPONENT: tl.constexpr = tl.constexpr((127 - 6) << 23)
SHIFT_TO_MAGIC: tl.constexpr = tl.constexpr((20 << 23) + (1 << 22))


@triton.jit
def _magnitude_bits(x):
    """Bit patterns of |x| for fp32 x."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_and_inverse(amax_bits, POWER_OF_TWO_SCALES: tl.constexpr):
    """Scale of a block, and what its numbers are multiplied by."""
    amax = tl.maximum(amax_bits, AMAX_FLOOR_BITS).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, E4M3_MAX)
    inverse = tl.div_rn(E4M3_MAX, amax)
    if POWER_OF_TWO_SCALES:
        bits = scale.to(tl.int32, bitcast=True)
        is_finite = bits < 0x7F800000
        scale = tl.where(is_finite, (bits + 0x7FFFFF) & 0x7F800000, bits).to(tl.float32, bitcast=True)
        inverse = tl.div_rn(1.0, scale)
    return scale, inverse


@triton.jit
def _rounded(y):
    """Fp32 numbers rounded to e4m3, ties to even, as `dsv3.fp8.quantize.round_to_e4m3_` does it."""
    exponent = y.to(tl.int32, bitcast=True) & 0x7F800000
    magic = (tl.maximum(exponent, SMALLEST_EXPONENT) + SHIFT_TO_MAGIC).to(tl.float32, bitcast=True)
    return (y + magic) - magic


@triton.jit
def quantize_rows_kernel(
    x_ptr, q_ptr, s_ptr, num_rows, num_inputs, ROWS: tl.constexpr, POWER_OF_TWO_SCALES: tl.constexpr
):
    """1x128 blocks: x (R, I) -> q (R, I), s (R, I / 128)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    is_row = row < num_rows
    at = row.to(tl.int64)[:, None] * num_inputs + block * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at, mask=is_row[:, None], other=0.0).to(tl.float32)
    scale, inverse = _scale_and_inverse(tl.max(_magnitude_bits(x), 1), POWER_OF_TWO_SCALES)
    tl.store(q_ptr + at, _rounded(x * inverse[:, None]).to(q_ptr.dtype.element_ty), mask=is_row[:, None])
    tl.store(s_ptr + row.to(tl.int64) * (num_inputs // BLOCK) + block, scale, mask=is_row)


@triton.jit
def quantize_weight_kernel(
    w_ptr, q_ptr, s_ptr, qt_ptr, st_ptr, num_outputs, num_inputs, POWER_OF_TWO_SCALES: tl.constexpr
):
    """128x128 blocks: w (E, O, I) -> q (E, O, I), s (E, O / 128, I / 128), and both transposed."""
    expert, output_block, input_block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    outputs = output_block * BLOCK + tl.arange(0, BLOCK)
    inputs = input_block * BLOCK + tl.arange(0, BLOCK)
    start = expert * num_outputs * num_inputs
    x = tl.load(w_ptr + start + outputs[:, None] * num_inputs + inputs[None, :]).to(tl.float32)
    scale, inverse = _scale_and_inverse(tl.max(tl.max(_magnitude_bits(x), 1), 0), POWER_OF_TWO_SCALES)
    tl.store(
        q_ptr + start + outputs[:, None] * num_inputs + inputs[None, :],
        _rounded(x * inverse).to(q_ptr.dtype.element_ty),
    )
    xt = tl.load(w_ptr + start + outputs[None, :] * num_inputs + inputs[:, None]).to(tl.float32)
    tl.store(
        qt_ptr + start + inputs[:, None] * num_outputs + outputs[None, :],
        _rounded(xt * inverse).to(q_ptr.dtype.element_ty),
    )
    tl.store(s_ptr + (expert * (num_outputs // BLOCK) + output_block) * (num_inputs // BLOCK) + input_block, scale)
    tl.store(st_ptr + (expert * (num_inputs // BLOCK) + input_block) * (num_outputs // BLOCK) + output_block, scale)


@triton.jit
def quantize_columns_kernel(
    x_ptr, index_ptr, q_ptr, s_ptr, expert_ptr, row_ptr, end_ptr, E, num_inputs, num_tiles,
    COLUMNS: tl.constexpr, GATHERS: tl.constexpr, POWER_OF_TWO_SCALES: tl.constexpr,
):  # fmt: skip
    """128x1 blocks inside each expert: x (A, I) -> q (I, Q * 128), contiguous along tokens, s (Q, I)."""
    tile = tl.program_id(0)
    expert = tl.load(expert_ptr + tile)
    if expert >= E:
        return
    token = tl.arange(0, BLOCK)
    row = tl.load(row_ptr + tile) + token
    is_row = row < tl.load(end_ptr + expert)
    if GATHERS:
        row = tl.load(index_ptr + row, mask=is_row, other=0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * num_inputs + column[None, :]
    x = tl.load(x_ptr + at, mask=is_row[:, None], other=0.0).to(tl.float32)
    scale, inverse = _scale_and_inverse(tl.max(_magnitude_bits(x), 0), POWER_OF_TWO_SCALES)
    q = tl.trans(_rounded(x * inverse[None, :]).to(q_ptr.dtype.element_ty))
    tl.store(q_ptr + (column.to(tl.int64) * num_tiles + tile)[:, None] * BLOCK + token[None, :], q)
    tl.store(s_ptr + tile.to(tl.int64) * num_inputs + column, scale)


@triton.jit
def _grouped_order(program, num_tiles, num_blocks):
    """Tile and output block of a program: all blocks of TILES_TOGETHER tiles before the next tiles."""
    first = program // (TILES_TOGETHER * num_blocks) * TILES_TOGETHER
    size = tl.minimum(num_tiles - first, TILES_TOGETHER)
    within = program - first * num_blocks
    return first + within % size, within // size


@triton.jit
def grouped_gemm_kernel(
    a_ptr, a_scale_ptr, index_ptr, b_ptr, b_scale_ptr, y_ptr, expert_ptr, row_ptr, end_ptr, E, num_outputs, num_inputs,
    num_tiles, GATHERS: tl.constexpr,
):  # fmt: skip
    """y[rows of e] = a[rows of e] @ b[e].T: forward with b = W (E, O, I), dgrad with b = W transposed."""
    tile, output_block = _grouped_order(tl.program_id(0), num_tiles, num_outputs // BLOCK)
    expert = tl.load(expert_ptr + tile)
    if expert >= E:
        return
    row = tl.load(row_ptr + tile) + tl.arange(0, BLOCK)
    is_row = row < tl.load(end_ptr + expert)
    source = row
    if GATHERS:
        source = tl.load(index_ptr + row, mask=is_row, other=0)
    outputs = output_block * BLOCK + tl.arange(0, BLOCK)
    inputs = tl.arange(0, BLOCK)
    num_input_blocks = num_inputs // BLOCK
    a_at = a_ptr + source.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
    a_scale_at = a_scale_ptr + source.to(tl.int64) * num_input_blocks
    b_at = b_ptr + expert.to(tl.int64) * num_outputs * num_inputs + outputs[:, None] * num_inputs + inputs[None, :]
    b_scale_at = b_scale_ptr + (expert * (num_outputs // BLOCK) + output_block) * num_input_blocks
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for block in range(0, num_input_blocks):
        a = tl.load(a_at + block * BLOCK, mask=is_row[:, None], other=0.0)
        b = tl.load(b_at + block * BLOCK)
        scale = tl.load(a_scale_at + block, mask=is_row, other=0.0) * tl.load(b_scale_at + block)
        total += tl.dot(a, tl.trans(b)) * scale[:, None]
    y_at = y_ptr + row.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def grouped_wgrad_kernel(
    g_ptr, g_scale_ptr, x_ptr, x_scale_ptr, w_ptr, tile_end_ptr, num_outputs, num_inputs, num_tiles
):
    """w[e] = g[rows of e].T @ x[rows of e], of what the column quantizer wrote; zeros for an expert without rows."""
    input_block, output_block, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(tile_end_ptr + expert - 1, mask=expert > 0, other=0)
    last = tl.load(tile_end_ptr + expert)
    outputs = output_block * BLOCK + tl.arange(0, BLOCK)
    inputs = input_block * BLOCK + tl.arange(0, BLOCK)
    token = tl.arange(0, BLOCK)
    g_at = g_ptr + (outputs.to(tl.int64) * num_tiles * BLOCK)[:, None] + token[None, :]
    x_at = x_ptr + (inputs.to(tl.int64) * num_tiles * BLOCK)[:, None] + token[None, :]
    g_scale_at = g_scale_ptr + first.to(tl.int64) * num_outputs + outputs
    x_scale_at = x_scale_ptr + first.to(tl.int64) * num_inputs + inputs
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for tile in range(first, last):
        g = tl.load(g_at + tile * BLOCK)
        x = tl.load(x_at + tile * BLOCK)
        total += tl.dot(g, tl.trans(x)) * tl.load(g_scale_at)[:, None] * tl.load(x_scale_at)[None, :]
        g_scale_at += num_outputs
        x_scale_at += num_inputs
    w_at = w_ptr + expert.to(tl.int64) * num_outputs * num_inputs + outputs[:, None] * num_inputs + inputs[None, :]
    tl.store(w_at, total.to(w_ptr.dtype.element_ty))

"""Tensors in, tensors out: the Triton kernels behind functions of torch tensors.

No tile of 128 rows holds rows of two experts.

Letters: R rows, A assignments, E n_routed_experts, O outputs, I inputs, Q blocks.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dsv3.fp8.definition import BLOCK
from dsv3.fp8.quantize import Quantized
from dsv3.kernels import triton_fp8

kernels: Any = triton_fp8
"""Triton's launch syntax says nothing to a type checker."""
ROWS_PER_PROGRAM = 32
COLUMNS_PER_PROGRAM = 32
WARPS_PER_WEIGHT_BLOCK = 16
NO_FP_FUSION: dict[str, Any] = {"enable_fp_fusion": False}
"""The quantizers' products must be rounded before the addition that follows them."""
HOPPER: dict[str, Any] = {"num_warps": 8, "num_stages": 4}
ADA: dict[str, Any] = {"num_warps": 16, "num_stages": 2}
"""With fewer warps, or a third stage, the compiler spills registers to memory (tests compile for both)."""


class Schedule(NamedTuple):
    """How the rows of all experts fall into tiles."""

    expert_Q: Tensor
    """Expert of each tile; E past the last tile."""
    row_Q: Tensor
    """First row of each tile."""
    end_E: Tensor
    """Row after each expert's last one."""
    tile_end_E: Tensor
    """Tile after each expert's last one."""


class QuantizedWeight(NamedTuple):
    """A stack of weights as forward takes it, and transposed as dgrad takes it."""

    forward: Quantized
    """(E, O, I) and (E, O / 128, I / 128)."""
    transposed: Quantized
    """(E, I, O) and (E, I / 128, O / 128)."""


def gemm_options(device: torch.device) -> dict[str, Any]:
    """Return how a GEMM is compiled for `device`."""
    is_ada = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    return ADA if is_ada else HOPPER


def schedule(end_E: Tensor, num_rows: int) -> Schedule:
    """Return the tiles of rows that end at `end_E` (int32); their number is a bound that needs no answer of a GPU."""
    count_E = torch.diff(end_E, prepend=end_E.new_zeros(1))
    tile_end_E = ((count_E + BLOCK - 1) // BLOCK).cumsum(0, dtype=torch.int32)
    num_experts, num_tiles = len(end_E), num_rows // BLOCK + len(end_E)
    tile_Q = torch.arange(num_tiles, dtype=torch.int32, device=end_E.device)
    expert_Q = torch.searchsorted(tile_end_E, tile_Q, right=True, out_int32=True)
    # Tile t of an expert starts t * 128 rows after the expert; both ends of the formula are cumulative.
    row_offset_E = (end_E - count_E) - BLOCK * (tile_end_E - (count_E + BLOCK - 1) // BLOCK)
    row_Q = BLOCK * tile_Q + row_offset_E[expert_Q.clamp_max(num_experts - 1).long()]
    return Schedule(expert_Q, row_Q.int(), end_E, tile_end_E)


def quantize_rows(x_RI: Tensor, power_of_two_scales: bool) -> Quantized:
    """Return e4m3 numbers (R, I) and scales (R, I / 128)."""
    num_rows, num_inputs = x_RI.shape
    values = torch.empty(x_RI.shape, dtype=torch.float8_e4m3fn, device=x_RI.device)
    scales = x_RI.new_empty(num_rows, num_inputs // BLOCK, dtype=torch.float32)
    grid = triton.cdiv(num_rows, ROWS_PER_PROGRAM), num_inputs // BLOCK
    if num_rows:
        kernels.quantize_rows_kernel[grid](
            x_RI,
            values,
            scales,
            num_rows,
            num_inputs,
            ROWS=ROWS_PER_PROGRAM,
            POWER_OF_TWO_SCALES=power_of_two_scales,
            **NO_FP_FUSION,
        )
    return Quantized(values, scales)


def quantize_weight(w_EOI: Tensor, power_of_two_scales: bool) -> QuantizedWeight:
    """Return the stack in 128x128 blocks, and its transpose."""
    num_experts, num_outputs, num_inputs = w_EOI.shape
    output_blocks, input_blocks = num_outputs // BLOCK, num_inputs // BLOCK
    forward = Quantized(
        torch.empty(w_EOI.shape, dtype=torch.float8_e4m3fn, device=w_EOI.device),
        torch.empty(num_experts, output_blocks, input_blocks, device=w_EOI.device),
    )
    transposed = Quantized(
        torch.empty(num_experts, num_inputs, num_outputs, dtype=torch.float8_e4m3fn, device=w_EOI.device),
        torch.empty(num_experts, input_blocks, output_blocks, device=w_EOI.device),
    )
    kernels.quantize_weight_kernel[num_experts, output_blocks, input_blocks](
        w_EOI,
        *forward,
        *transposed,
        num_outputs,
        num_inputs,
        POWER_OF_TWO_SCALES=power_of_two_scales,
        num_warps=WARPS_PER_WEIGHT_BLOCK,
        **NO_FP_FUSION,
    )
    return QuantizedWeight(forward, transposed)


def quantize_columns(x_RI: Tensor, tiles: Schedule, index_A: Tensor | None, power_of_two_scales: bool) -> Quantized:
    """Return e4m3 numbers (I, Q * 128) and scales (Q, I) of the rows of `x_RI`, or of its rows `index_A`.

    Columns past an expert's last row are zeros; those of tiles that hold nothing are left as they are, and nobody reads
    them.
    """
    num_inputs, num_tiles = x_RI.shape[1], len(tiles.expert_Q)
    values = torch.empty(num_inputs, num_tiles * BLOCK, dtype=torch.float8_e4m3fn, device=x_RI.device)
    scales = torch.empty(num_tiles, num_inputs, device=x_RI.device)
    kernels.quantize_columns_kernel[num_tiles, num_inputs // COLUMNS_PER_PROGRAM](
        x_RI,
        tiles.row_Q if index_A is None else index_A,
        values,
        scales,
        tiles.expert_Q,
        tiles.row_Q,
        tiles.end_E,
        len(tiles.end_E),
        num_inputs,
        num_tiles,
        COLUMNS=COLUMNS_PER_PROGRAM,
        GATHERS=index_A is not None,
        POWER_OF_TWO_SCALES=power_of_two_scales,
        **NO_FP_FUSION,
    )
    return Quantized(values, scales)


def grouped_gemm(
    a_RI: Quantized, index_A: Tensor | None, b_EOI: Quantized, tiles: Schedule, num_rows: int, dtype: torch.dtype
) -> Tensor:
    """Return y (A, O): rows of `a_RI` (or its rows `index_A`) times the transpose of their expert's `b_EOI`."""
    num_outputs, num_inputs = b_EOI.values.shape[1:]
    y_AO = torch.empty(num_rows, num_outputs, dtype=dtype, device=b_EOI.values.device)
    kernels.grouped_gemm_kernel[(num_outputs // BLOCK * len(tiles.expert_Q),)](
        *a_RI,
        tiles.row_Q if index_A is None else index_A,
        *b_EOI,
        y_AO,
        tiles.expert_Q,
        tiles.row_Q,
        tiles.end_E,
        len(tiles.end_E),
        num_outputs,
        num_inputs,
        len(tiles.expert_Q),
        GATHERS=index_A is not None,
        **gemm_options(b_EOI.values.device),
    )
    return y_AO


def grouped_wgrad(grad_OA: Quantized, x_IA: Quantized, tiles: Schedule, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the weights (E, O, I) from column-quantized gradient and input."""
    num_tiles, num_outputs = grad_OA.scales.shape
    num_inputs = x_IA.scales.shape[1]
    w_EOI = torch.empty(len(tiles.end_E), num_outputs, num_inputs, dtype=dtype, device=grad_OA.values.device)
    kernels.grouped_wgrad_kernel[num_inputs // BLOCK, num_outputs // BLOCK, len(tiles.end_E)](
        *grad_OA,
        *x_IA,
        w_EOI,
        tiles.tile_end_E,
        num_outputs,
        num_inputs,
        num_tiles,
        **gemm_options(w_EOI.device),
    )
    return w_EOI

"""Tensors in, tensors out: the Triton kernels behind functions of torch tensors.

Letters: R rows, S rows sorted by expert, T tokens, E experts, N outputs, K inputs, M tiles of 128 rows, none of which
holds rows of two experts.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dsv3.fp8.definition import BLOCK
from dsv3.fp8.quantize import Quantised
from dsv3.kernels import triton_fp8

kernels: Any = triton_fp8
"""Triton's launch syntax says nothing to a type checker."""
ROWS_PER_PROGRAM = 32
COLUMNS_PER_PROGRAM = 32
EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""The quantisers' products must be rounded before the addition that follows them."""
HOPPER: dict[str, Any] = {"num_warps": 8, "num_stages": 4}
ADA: dict[str, Any] = {"num_warps": 16, "num_stages": 2}
"""With fewer warps, or a third stage, the compiler spills registers to memory (tests compile for both)."""


class Schedule(NamedTuple):
    """How the rows of all experts fall into tiles."""

    expert_M: Tensor
    """Expert of each tile; E past the last tile."""
    row_M: Tensor
    """First row of each tile."""
    end_E: Tensor
    """Row after each expert's last one."""
    tile_end_E: Tensor
    """Tile after each expert's last one."""


class QuantisedWeight(NamedTuple):
    """A stack of weights as forward takes it, and transposed as dgrad takes it."""

    forward: Quantised
    """(E, N, K) and (E, N / 128, K / 128)."""
    transposed: Quantised
    """(E, K, N) and (E, K / 128, N / 128)."""


def gemm_options(device: torch.device) -> dict[str, Any]:
    """Return how a GEMM is compiled for `device`."""
    is_ada = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    return ADA if is_ada else HOPPER


def schedule(end_E: Tensor, num_rows: int) -> Schedule:
    """Return the tiles of rows that end at `end_E` (int32); their number is a bound that needs no answer of a GPU."""
    count_E = torch.diff(end_E, prepend=end_E.new_zeros(1))
    tile_end_E = ((count_E + BLOCK - 1) // BLOCK).cumsum(0, dtype=torch.int32)
    num_experts, num_tiles = len(end_E), num_rows // BLOCK + len(end_E)
    tile_M = torch.arange(num_tiles, dtype=torch.int32, device=end_E.device)
    expert_M = torch.searchsorted(tile_end_E, tile_M, right=True, out_int32=True)
    # Tile t of an expert starts t * 128 rows after the expert; both ends of the formula are cumulative.
    row_offset_E = (end_E - count_E) - BLOCK * (tile_end_E - (count_E + BLOCK - 1) // BLOCK)
    row_M = BLOCK * tile_M + row_offset_E[expert_M.clamp_max(num_experts - 1).long()]
    return Schedule(expert_M, row_M.int(), end_E, tile_end_E)


def quantise_rows(x_RK: Tensor, pow2: bool) -> Quantised:
    """Return e4m3 numbers (R, K) and scales (R, K / 128)."""
    num_rows, num_inputs = x_RK.shape
    values = torch.empty(x_RK.shape, dtype=torch.float8_e4m3fn, device=x_RK.device)
    scales = x_RK.new_empty(num_rows, num_inputs // BLOCK, dtype=torch.float32)
    grid = triton.cdiv(num_rows, ROWS_PER_PROGRAM), num_inputs // BLOCK
    if num_rows:
        kernels.quantise_rows_kernel[grid](
            x_RK, values, scales, num_rows, num_inputs, ROWS=ROWS_PER_PROGRAM, POW2=pow2, **EXACT
        )
    return Quantised(values, scales)


def quantise_weight(w_ENK: Tensor, pow2: bool) -> QuantisedWeight:
    """Return the stack in 128x128 blocks, and its transpose."""
    num_experts, num_outputs, num_inputs = w_ENK.shape
    n_blocks, k_blocks = num_outputs // BLOCK, num_inputs // BLOCK
    forward = Quantised(
        torch.empty(w_ENK.shape, dtype=torch.float8_e4m3fn, device=w_ENK.device),
        torch.empty(num_experts, n_blocks, k_blocks, device=w_ENK.device),
    )
    transposed = Quantised(
        torch.empty(num_experts, num_inputs, num_outputs, dtype=torch.float8_e4m3fn, device=w_ENK.device),
        torch.empty(num_experts, k_blocks, n_blocks, device=w_ENK.device),
    )
    kernels.quantise_weight_kernel[num_experts, n_blocks, k_blocks](
        w_ENK, *forward, *transposed, num_outputs, num_inputs, POW2=pow2, num_warps=8, **EXACT
    )
    return QuantisedWeight(forward, transposed)


def quantise_columns(x_RK: Tensor, tiles: Schedule, index_S: Tensor | None, pow2: bool) -> Quantised:
    """Return e4m3 numbers (K, M * 128) and scales (M, K) of the rows of `x_RK`, or of its rows `index_S`.

    Columns past an expert's last row are zeros; those of tiles that hold nothing are left as they are, and nobody reads
    them.
    """
    num_inputs, num_tiles = x_RK.shape[1], len(tiles.expert_M)
    values = torch.empty(num_inputs, num_tiles * BLOCK, dtype=torch.float8_e4m3fn, device=x_RK.device)
    scales = torch.empty(num_tiles, num_inputs, device=x_RK.device)
    kernels.quantise_columns_kernel[num_tiles, num_inputs // COLUMNS_PER_PROGRAM](
        x_RK,
        tiles.row_M if index_S is None else index_S,
        values,
        scales,
        tiles.expert_M,
        tiles.row_M,
        tiles.end_E,
        len(tiles.end_E),
        num_inputs,
        num_tiles,
        COLUMNS=COLUMNS_PER_PROGRAM,
        GATHERS=index_S is not None,
        POW2=pow2,
        **EXACT,
    )
    return Quantised(values, scales)


def grouped_gemm(
    a_RK: Quantised, index_S: Tensor | None, b_ENK: Quantised, tiles: Schedule, num_rows: int, dtype: torch.dtype
) -> Tensor:
    """Return y (S, N): rows of `a_RK` (or its rows `index_S`) times the transpose of their expert's `b_ENK`."""
    num_outputs, num_inputs = b_ENK.values.shape[1:]
    y_SN = torch.empty(num_rows, num_outputs, dtype=dtype, device=b_ENK.values.device)
    kernels.grouped_gemm_kernel[num_outputs // BLOCK, len(tiles.expert_M)](
        *a_RK,
        tiles.row_M if index_S is None else index_S,
        *b_ENK,
        y_SN,
        tiles.expert_M,
        tiles.row_M,
        tiles.end_E,
        len(tiles.end_E),
        num_outputs,
        num_inputs,
        GATHERS=index_S is not None,
        **gemm_options(b_ENK.values.device),
    )
    return y_SN


def grouped_wgrad(grad_NS: Quantised, x_KS: Quantised, tiles: Schedule, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the weights (E, N, K) from column-quantised gradient and input."""
    num_tiles, num_outputs = grad_NS.scales.shape
    num_inputs = x_KS.scales.shape[1]
    w_ENK = torch.empty(len(tiles.end_E), num_outputs, num_inputs, dtype=dtype, device=grad_NS.values.device)
    kernels.grouped_wgrad_kernel[num_inputs // BLOCK, num_outputs // BLOCK, len(tiles.end_E)](
        *grad_NS,
        *x_KS,
        w_ENK,
        tiles.tile_end_E,
        num_outputs,
        num_inputs,
        num_tiles,
        **gemm_options(w_ENK.device),
    )
    return w_ENK

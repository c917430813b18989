"""Experts and linear layers whose products run in FP8 on the GPU.

The same computation as `dsv3.kernels.cpu` with an FP8 rounding, launched as a few kernels for all experts at once. Weights
are quantised once per optimizer step; the tokens' rows are quantised before they are copied to their experts, so a token
with eight experts is quantised once.

Letters: T tokens, K experts per token, S = T * K pairs sorted by expert, E experts, H hidden size, I intermediate size;
for linear layers R rows, K inputs, N outputs.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.errors import UserError
from dsv3.fp8.definition import BLOCK
from dsv3.fp8.recipe import Recipe
from dsv3.fp8.rounding import until_changed
from dsv3.kernels.permute import ExpertOrder, expert_order, sum_per_token, with_inverse
from dsv3.kernels.swiglu import swiglu_backward
from dsv3.kernels.triton_launch import (
    QuantisedWeight,
    Schedule,
    grouped_gemm,
    grouped_wgrad,
    quantise_columns,
    quantise_rows,
    quantise_weight,
    schedule,
)


def experts(  # noqa: PLR0913 (five tensors and the recipe)
    hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, recipe: Recipe
) -> Tensor:
    """Return the weighted sum of each token's experts, shape (T, H), in the dtype of `hidden_TH`.

    Raises `UserError` where a dimension is no multiple of 128.
    """
    hidden_size, intermediate_size = down_EHI.shape[1:]
    if hidden_size % BLOCK or intermediate_size % BLOCK:
        raise UserError(
            f"train.experts is triton_fp8; needs dimensions that are multiples of {BLOCK}, not hidden_size "
            f"{hidden_size} and moe_intermediate_size {intermediate_size}, take fp8_emulated"
        )
    pow2 = recipe.has_power_of_two_scales
    return _forward(hidden_TH, index_TK, weight_TK, gate_up_E2IH, down_EHI, pow2, recipe.quantises_wgrad)[0]


def linear_product(x_RK: Tensor, weight_NK: Tensor, recipe: Recipe) -> Tensor:
    """Return x @ weight.T, all three products in FP8; dimensions are padded to multiples of 128."""
    num_outputs, num_inputs = weight_NK.shape
    x_RK = _padded(x_RK, 1)
    pow2 = recipe.has_power_of_two_scales
    return _linear(x_RK, weight_NK, pow2, recipe.quantises_wgrad)[:, :num_outputs]


def _padded(x: Tensor, num_dims: int) -> Tensor:
    """Return `x` with its last dimensions padded by zeros to multiples of 128."""
    gaps = [-size % BLOCK for size in reversed(x.shape[-num_dims:])]
    return F.pad(x, [side for gap in gaps for side in (0, gap)]) if any(gaps) else x


def _quantised(weight: Tensor, pow2: bool) -> QuantisedWeight:
    """Return the quantised weight or stack of weights, computed once per optimizer step."""

    def derive(weight: Tensor) -> QuantisedWeight:
        stack = weight if weight.dim() == 3 else weight[None]
        return quantise_weight(_padded(stack, 2).contiguous(), pow2)

    return until_changed(weight, f"triton_fp8_{pow2}", derive)

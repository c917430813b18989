"""Emulated precision: what the operands of a GEMM are rounded to before it runs in fp32.

A low-precision GEMM with fp32 accumulation is an fp32 GEMM of operands that were rounded first (up to the order of
summation), so one function per kind of operand is all that an emulation needs. Runs that use one are labelled emulated.

Everything here is a pure function. `dsv3.kernels.weight_cache` rounds weights once for all passes of an optimizer step.

Letters: R rows, W columns, O outputs, I inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from dsv3.fp8.quantize import quantized_rows, rounded_along_outputs, rounded_columns, rounded_rows, rounded_weight
from dsv3.fp8.recipe import RECIPES, Recipe
from dsv3.fp8.swiglu_cache import Quantizer


@dataclass(frozen=True)
class Rounding:
    """Three functions from a tensor to its rounded fp32 values; None leaves the operand as it is."""

    name: str
    rows: Callable[[Tensor], Tensor] | None
    """Activations and gradients as operands of forward and dgrad: (..., W) along the last dimension."""
    columns: Callable[[Tensor], Tensor] | None
    """The same as operands of wgrad: (R, W) along the rows."""
    weights: Callable[[Tensor], Tensor] | None
    """Weights (..., O, I) as operands of forward and, unless `dgrad_weights` says otherwise, of dgrad."""
    dgrad_weights: Callable[[Tensor], Tensor] | None = None
    """The same as operands of dgrad, where blocks along the inner dimension make other numbers of them."""
    swiglu_cache: Quantizer | None = None
    """The stored form in which the experts keep their activation's input for the backward pass."""

    def of_rows(self, x_W: Tensor) -> Tensor:
        """Return `x_W`, (..., W), as forward and dgrad see it."""
        return self.rows(x_W) if self.rows else x_W

    def of_columns(self, x_RW: Tensor) -> Tensor:
        """Return `x_RW` as wgrad sees it."""
        return self.columns(x_RW) if self.columns else x_RW

    def of_weight(self, weight_OI: Tensor, is_for_dgrad: bool = False) -> Tensor:
        """Return `weight_OI`, or a stack of weights, as forward, or dgrad, sees it."""
        weights = self.dgrad_weights if is_for_dgrad and self.dgrad_weights else self.weights
        return weights(weight_OI) if weights else weight_OI


def bf16_values(x: Tensor) -> Tensor:
    """Return `x` rounded to bf16, as fp32."""
    return x.bfloat16().float()


def _emulation(recipe: Recipe) -> Rounding:
    """Return the emulation of block-scaled FP8 by `recipe`."""
    blocks = recipe.blocks
    scales = {"power_of_two_scales": blocks["power_of_two_scales"]}
    rows, is_mx = partial(rounded_rows, **blocks), recipe.mx_blocks
    squares = partial(rounded_weight, **scales)
    return Rounding(
        name=recipe.name,
        rows=rows if recipe.activation_quant else None,
        columns=partial(rounded_columns, **blocks) if recipe.activation_quant and recipe.wgrad_quant else None,
        weights=(rows if is_mx else squares) if recipe.weight_quant else None,
        dgrad_weights=partial(rounded_along_outputs, **blocks) if recipe.weight_quant and is_mx else None,
        swiglu_cache=partial(quantized_rows, **scales) if recipe.swiglu_cache else None,
    )


EXACT = Rounding("exact", None, None, None)
BF16 = Rounding("bf16", bf16_values, bf16_values, bf16_values)
ROUNDINGS = {rounding.name: rounding for rounding in (EXACT, BF16, *map(_emulation, RECIPES.values()))}
"""Every rounding by its name: operators of torch.library take strings, not objects."""


def fp8_rounding(recipe: Recipe) -> Rounding:
    """Return the emulation of block-scaled FP8 by `recipe`."""
    return ROUNDINGS[recipe.name]

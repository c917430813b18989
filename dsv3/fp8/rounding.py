"""Emulated precision: what the operands of a GEMM are rounded to before it runs in fp32.

A low-precision GEMM with fp32 accumulation is an fp32 GEMM of operands that were rounded first (up to the order of
summation), so one function per kind of operand is all that an emulation needs. Runs that use one are labelled emulated.

Letters: R rows, C columns, D any leading dimensions, N outputs, K inputs of a weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from dsv3.fp8.quantize import quantised_rows, rounded_columns, rounded_rows, rounded_weight
from dsv3.fp8.recipe import Recipe
from dsv3.fp8.swiglu_cache import Quantiser

ROUNDINGS: dict[str, "Rounding"] = {}
"""Every rounding by its name; operators of torch.library take strings, not objects."""


@dataclass(frozen=True)
class Rounding:
    """Three functions from a tensor to its rounded fp32 values; None leaves the operand as it is."""

    name: str
    rows: Callable[[Tensor], Tensor] | None
    """Activations and gradients as operands of forward and dgrad: (..., C) along the last dimension."""
    columns: Callable[[Tensor], Tensor] | None
    """The same as operands of wgrad: (R, C) along the rows."""
    weights: Callable[[Tensor], Tensor] | None
    """Weights (..., N, K); the result is kept until the parameter changes."""
    cache: Quantiser | None = None
    """The stored form in which an activation waits for the backward pass."""

    def of_rows(self, x_DC: Tensor) -> Tensor:
        """Return `x_DC` as forward and dgrad see it."""
        return while_same(x_DC, self.name + ".rows", self.rows) if self.rows else x_DC

    def of_columns(self, x_RC: Tensor) -> Tensor:
        """Return `x_RC` as wgrad sees it."""
        return while_same(x_RC, self.name + ".columns", self.columns) if self.columns else x_RC

    def of_weight(self, weight_DNK: Tensor) -> Tensor:
        """Return `weight_DNK` as forward and dgrad see it, computed once per optimizer step."""
        return until_changed(weight_DNK, self.name, self.weights) if self.weights else weight_DNK


def bf16_values(x: Tensor) -> Tensor:
    """Return `x` rounded to bf16, as fp32."""
    return x.bfloat16().float()


def fp8_rounding(recipe: Recipe) -> Rounding:
    """Return the emulation of block-scaled FP8 by `recipe`, after entering it in `ROUNDINGS`."""
    pow2 = recipe.has_power_of_two_scales
    is_on = recipe.quantises_activations
    rounding = Rounding(
        name="_".join(["fp8", *recipe.deviations()]),
        rows=partial(rounded_rows, pow2=pow2) if is_on else None,
        columns=partial(rounded_columns, pow2=pow2) if is_on and recipe.quantises_wgrad else None,
        weights=partial(rounded_weight, pow2=pow2) if recipe.quantises_weights else None,
        cache=partial(quantised_rows, pow2=pow2) if recipe.caches_swiglu else None,
    )
    return ROUNDINGS.setdefault(rounding.name, rounding)


EXACT = ROUNDINGS.setdefault("exact", Rounding("exact", None, None, None))
BF16 = ROUNDINGS.setdefault("bf16", Rounding("bf16", bf16_values, bf16_values, bf16_values))

_derived = WeakIdKeyDictionary()
"""Storage -> (name, address, shape) -> (version, derived value)."""


def _forget_derived(*_: Any) -> None:
    """Drop everything derived from weights: an optimizer has stepped."""
    _derived.clear()


register_optimizer_step_post_hook(_forget_derived)


def until_changed(weight: Tensor, name: str, derive: Callable[[Tensor], Any]) -> Any:
    """Return `derive(weight)`, computed again only after `weight` was written to or replaced.

    The micro-batches between two optimizer steps share one result, and so do a parameter and what stands for it in the
    backward pass of a checkpointed layer, which is another tensor of the same storage. A change is seen by the version,
    which every in-place operation raises, except for torch's fused optimizers and writes through `.data`; therefore
    the step of any torch optimizer clears all entries, too. Entries vanish with their storage.
    """
    if weight.is_inference():
        return derive(weight)
    entries: Any = _derived.setdefault(weight.untyped_storage(), {})
    key = name, weight.data_ptr(), weight.shape
    if key not in entries or entries[key][0] != weight._version:
        with torch.no_grad():
            entries[key] = (weight._version, derive(weight))
    return entries[key][1]


_latest: dict[str, tuple[Tensor, int, Tensor]] = {}
"""Name -> (tensor, its version, derived tensor)."""


def while_same(x: Tensor, name: str, derive: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `derive(x)`, computed once while the calls under `name` come with the same memory and contents.

    Several layers read one activation (gate and up, queries and latents). The entry holds `x`, so that its memory can't
    become another tensor's meanwhile; this keeps one activation and its rounded copy alive until the next call.

    Only for what requires a gradient: the code that torch.compile generates writes to its own buffers, which never do,
    again and again without raising their version.
    """
    if not x.requires_grad:
        return derive(x)
    entry = _latest.get(name)
    if entry is not None and _is_same(entry[0], x) and entry[1] == x._version:
        return entry[2]
    _latest[name] = (x, x._version, derive(x))
    return _latest[name][2]


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Return whether the two are one tensor, or views of the same numbers."""
    return x is y or (
        x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype
    )

"""Which layers of a model compute in low precision: a rule, and a report of what it did.

DeepSeek-V3 keeps in high precision the embedding, the output head, the router, the norms and the attention operators
(report, section 3.3.1); every other linear layer runs in FP8. Here the rule is: every `nn.Linear` except the output
head, those named in `HIGH_PRECISION`, and those with a dimension smaller than one block. A dimension that is no
multiple of 128 ends in a shorter block (`kv_a_proj_with_mqa`), which equals padding with zeros.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from dsv3.devices import multiplies_fp8
from dsv3.fp8.definition import BLOCK
from dsv3.fp8.linear import LowPrecisionLinear, LowPrecisionMLP, Product
from dsv3.fp8.recipe import Recipe
from dsv3.fp8.rounding import BF16, fp8_rounding
from dsv3.kernels import emulated_linear
from mini_model.modeling_deepseek import DeepseekV3MLP

HIGH_PRECISION = frozenset({"lm_head", "shared_head", "gate", "router"})
"""Last parts of module names that stay in high precision wherever they stand."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` did to the linear layers."""

    precision: str
    """How the converted layers multiply: fp8, fp8_emulated, bf16_emulated, with the recipe's deviations."""
    converted: list[str] = field(default_factory=list)
    """Module names."""
    high_precision: dict[str, str] = field(default_factory=dict)
    """Module name -> why it stays in high precision."""
    partial_blocks: list[str] = field(default_factory=list)
    """Converted modules with a dimension that is no multiple of 128."""

    is_native: bool = False
    """The device multiplies in FP8 itself; nothing is emulated."""

    def kernel(self, device: torch.device, num_rows: int, dtype: torch.dtype) -> str | None:
        """Return what multiplies that many rows in the device's own FP8, into `dtype`; None where nothing does."""
        if not (self.is_native and self.converted):
            return None
        from dsv3.kernels.dense_gemm import dense_kernel  # triton is not installed with every torch

        return dense_kernel(device, num_rows, dtype)


def convert(model: nn.Module, recipe: Recipe, device: torch.device) -> Conversion:
    """Replace the linear layers of `model` by FP8 ones that share their parameters; return what was done.

    On a GPU that multiplies e4m3 they run this project's Triton kernels; elsewhere, and with one side only or MXFP8's
    blocks, they are emulated.
    """
    recipe = replace(recipe, swiglu_cache=False)  # a knob of the routed experts; linear layers keep their inputs whole
    if multiplies_fp8(device) and recipe.has_kernels:
        from dsv3.kernels import triton_linear  # triton is not installed with every torch

        return replace(_replace(model, triton_linear.product(recipe), recipe.name), is_native=True)
    precision = "_".join(["fp8_emulated", *recipe.deviations()])
    return _replace(model, emulated_linear.product(fp8_rounding(recipe)), precision)


def emulate_bf16(model: nn.Module) -> Conversion:
    """Replace the linear layers of `model` by ones that round their operands to bf16 and multiply in fp32.

    For a CPU without native bf16, where real bf16 products are 27 times slower than fp32 ones. Attention operators and
    the output head stay in fp32.
    """
    return _replace(model, emulated_linear.product(BF16), "bf16_emulated", smallest=1)


def _replace(model: nn.Module, product: Product, precision: str, smallest: int = BLOCK) -> Conversion:
    """Replace every linear layer that the rule names."""
    conversion = Conversion(precision)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, linear in linears:
        reason = _reason_to_keep(name, linear, smallest)
        if reason:
            conversion.high_precision[name] = reason
            continue
        conversion.converted.append(name)
        if linear.in_features % BLOCK or linear.out_features % BLOCK:
            conversion.partial_blocks.append(name)
        model.set_submodule(name, LowPrecisionLinear(linear, product))
    for name, mlp in [(name, module) for name, module in model.named_modules() if isinstance(module, DeepseekV3MLP)]:
        if isinstance(mlp.gate_proj, LowPrecisionLinear) and isinstance(mlp.up_proj, LowPrecisionLinear):
            model.set_submodule(name, LowPrecisionMLP(mlp))
    return conversion


def _reason_to_keep(name: str, linear: nn.Linear, smallest: int) -> str | None:
    """Return why the layer stays in high precision, or None."""
    named = HIGH_PRECISION.intersection(name.split("."))
    if named:
        return f"{min(named)} stays in high precision"
    if min(linear.in_features, linear.out_features) < smallest:
        return f"{linear.out_features}x{linear.in_features} is smaller than one {BLOCK}x{BLOCK} block"
    return None

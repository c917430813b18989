"""Which operands are quantized, and how: the knobs of block-scaled FP8.

Each knob is `train.fp8_<name>` in params.yaml, and has the same name here and in the kernels.
"""

from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from dsv3.fp8.definition import BLOCK, MX_BLOCK
from dsv3.params.expert_backends import has_fp8_kernels


@dataclass(frozen=True)
class Recipe:
    """The choices of a quantized layer; the defaults are DeepSeek-V3's GEMMs (report, section 3.3)."""

    weight_quant: bool = True
    """Weights are quantized, in 128x128 blocks."""
    activation_quant: bool = True
    """Activations and their gradients are, in 1x128 tiles, and in 128x1 tiles for the weight gradient."""
    power_of_two_scales: bool = False
    """Scales are rounded up to powers of two: exact to multiply by, at up to one bit of range."""
    mx_blocks: bool = False
    """MXFP8 instead: all operands, weights too, in blocks of 32 along the inner dimension, power-of-two scales."""
    wgrad_quant: bool = True
    """The weight gradient's GEMM takes FP8 operands, too."""
    swiglu_cache: bool = False
    """The input of the routed experts' SwiGLU is kept for the backward pass in FP8 (section 3.3.3, DeepSeek's choice;
    here it is off by default, because it moves the gradients and not the loss)."""

    @property
    def has_kernels(self) -> bool:
        """Whether this project's kernels compute it."""
        return has_fp8_kernels(self.weight_quant, self.activation_quant, self.mx_blocks)

    @property
    def blocks(self) -> dict[str, Any]:
        """How long a block of activations is, and its kind of scale, as `dsv3.fp8.quantize` takes them."""
        return {
            "power_of_two_scales": self.power_of_two_scales or self.mx_blocks,
            "block": MX_BLOCK if self.mx_blocks else BLOCK,
        }

    def deviations(self) -> list[str]:
        """Return a word for each knob that is not at its default, for the name under which a run is recorded."""
        changed = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: value for name, value in changed.items() if value != getattr(DEEPSEEK_RECIPE, name)}
        return [name if value else f"no_{name}" for name, value in changed.items()]

    @property
    def name(self) -> str:
        """The name by which operators find the recipe in `RECIPES`."""
        return "_".join(["fp8", *self.deviations()])


DEEPSEEK_RECIPE = Recipe()
RECIPES = {
    recipe.name: recipe for recipe in (Recipe(*choice) for choice in product((True, False), repeat=len(fields(Recipe))))
}
"""Every recipe by its name: operators of torch.library take strings, not objects."""

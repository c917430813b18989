"""Which operands are quantized, and how: the knobs of block-scaled FP8.

Each knob is `train.fp8_<name>` in params.yaml, and has the same name here and in the kernels.
"""

from dataclasses import dataclass, fields
from itertools import product


@dataclass(frozen=True)
class Recipe:
    """The choices of a quantized layer; the defaults are DeepSeek-V3's GEMMs (report, section 3.3)."""

    weight_quant: bool = True
    """Weights are quantized, in 128x128 blocks."""
    activation_quant: bool = True
    """Activations and their gradients are, in 1x128 tiles, and in 128x1 tiles for the weight gradient."""
    power_of_two_scales: bool = False
    """Scales are rounded up to powers of two: exact to multiply by, at up to one bit of range."""
    wgrad_quant: bool = True
    """The weight gradient's GEMM takes FP8 operands, too."""
    swiglu_cache: bool = False
    """The input of the routed experts' SwiGLU is kept for the backward pass in FP8 (section 3.3.3, DeepSeek's choice;
    here it is off by default, because it moves the gradients and not the loss)."""

    @property
    def quantizes_both_sides(self) -> bool:
        """Whether both operands of forward and dgrad are FP8; with one side only, no FP8 instruction fits."""
        return self.weight_quant and self.activation_quant

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

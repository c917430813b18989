"""Which operands are quantised, and how: the knobs of block-scaled FP8."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The choices of a quantised layer; the defaults are DeepSeek-V3's GEMMs (report, section 3.3)."""

    quantises_weights: bool = True
    """Weights in 128x128 blocks."""
    quantises_activations: bool = True
    """Activations and their gradients in 1x128 tiles, and in 128x1 tiles for the weight gradient."""
    has_power_of_two_scales: bool = False
    """Scales rounded up to powers of two: exact to multiply by, at up to one bit of range."""
    quantises_wgrad: bool = True
    """Whether the weight gradient's GEMM takes FP8 operands, too."""
    caches_swiglu: bool = False
    """Whether the input of the routed experts' SwiGLU waits for the backward pass in FP8 (section 3.3.3, DeepSeek's
    choice; here it is one, because it moves the gradients and not the loss)."""

    @property
    def quantises_both_sides(self) -> bool:
        """Whether both operands of forward and dgrad are FP8; with one side only, no FP8 instruction fits."""
        return self.quantises_weights and self.quantises_activations

    def deviations(self) -> list[str]:
        """Return a word for each choice that is not the default, for the name under which a run is recorded."""
        words = {
            "high_weights": not self.quantises_weights,
            "high_activations": not self.quantises_activations,
            "pow2": self.has_power_of_two_scales,
            "high_wgrad": not self.quantises_wgrad,
            "fp8_swiglu_cache": self.caches_swiglu,
        }
        return [word for word, deviates in words.items() if deviates]


DEEPSEEK_RECIPE = Recipe()

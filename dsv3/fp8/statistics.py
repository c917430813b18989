"""What block scaling does to a model's numbers: underflow, saturation, outliers and error, layer by layer.

Three things can go wrong with an FP8 tensor. Numbers far below their block's largest become zero (underflow). Numbers
pile up at the end of the range (saturation; with scales from the block itself only its largest number reaches the
end, a share of 1/128 or a little more). And a single huge number makes the rest of its block coarse (outliers): the
crest, the largest magnitude divided by the root mean square, measures how far a block is from even.

A fourth is seen in what comes out: gradients that are zero where they should not be.

Everything is a ratio of two sums, so that the statistics of a model are the sum of its layers', and a large tensor is
gone through in pieces.

Letters: Q blocks, W columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.fp8.definition import BLOCK, E4M3_MAX
from dsv3.fp8.linear import LowPrecisionLinear
from dsv3.fp8.quantize import padded, round_to_e4m3_, scale_and_inverse
from dsv3.fp8.recipe import DEEPSEEK_RECIPE, Recipe
from mini_model.modeling_deepseek import DeepseekV3Experts

OUTLIER_CREST = 8.0
"""A block counts as one with an outlier from here on; of 128 normal numbers the largest is at 2.7 on average."""
CHUNK_NUMBERS = 1 << 22
"""Numbers looked at together: half a dozen temporary tensors of this size exist."""
WEIGHTS: dict[type[nn.Module], dict[str, str]] = {
    LowPrecisionLinear: {"weight": "weight"},
    DeepseekV3Experts: {"gate_up": "gate_up_proj", "down": "down_proj"},
}
"""The modules that are watched, and their weights: operand -> name of the parameter."""


@dataclass(frozen=True)
class Statistics:
    """Sums over tensors; add them up for the statistics of several."""

    num_numbers: float = 0
    """Numbers that are not zero: padding must not flatter."""
    num_underflows: float = 0
    num_saturated: float = 0
    num_blocks: float = 0
    """Blocks with any number that is not zero."""
    num_outlier_blocks: float = 0
    square: float = 0
    """Of the tensor's norm."""
    error_square: float = 0
    """Of the rounding error's norm."""
    num_gradients: float = 0
    """Entries of the weight's gradient, without experts that got no token."""
    num_nonzero_gradients: float = 0

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(*(own + its for own, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def underflow_share(self) -> float:
        """Return the share of the numbers that become zero."""
        return self.num_underflows / max(self.num_numbers, 1)

    @property
    def saturation_share(self) -> float:
        """Return the share of the numbers that are stored as +-448."""
        return self.num_saturated / max(self.num_numbers, 1)

    @property
    def outlier_block_share(self) -> float:
        """Return the share of the blocks whose crest is at least `OUTLIER_CREST`."""
        return self.num_outlier_blocks / max(self.num_blocks, 1)

    @property
    def relative_error(self) -> float:
        """Return the norm of the rounding error as a share of the tensor's norm."""
        return (self.error_square / self.square) ** 0.5 if self.square else 0.0

    def shares(self) -> dict[str, float]:
        """Return what was measured, by the names under which it is recorded."""
        names = ("underflow_share", "saturation_share", "outlier_block_share", "relative_error")
        found: dict[str, float] = {name: getattr(self, name) for name in names} if self.num_numbers else {}
        if self.num_gradients:
            found["nonzero_grad_share"] = self.num_nonzero_gradients / self.num_gradients
        return found


Found = dict[str, dict[str, Statistics]]
"""Module -> operand (`input`, `gradient`, and its weights) -> statistics."""


def row_statistics(x: Tensor, power_of_two_scales: bool = False, block: int = BLOCK) -> Statistics:
    """Return the statistics of activations or gradients in blocks along the last dimension."""
    blocks = padded(x.detach().float(), 1, block).reshape(-1, block)
    return Statistics(*_sums(blocks, power_of_two_scales).tolist())


def weight_statistics(weight: Tensor, power_of_two_scales: bool = False) -> Statistics:
    """Return the statistics of a weight, or a stack of weights, in 128x128 blocks."""
    num_outputs, num_inputs = weight.shape[-2:]
    total = torch.zeros(7, dtype=torch.float64, device=weight.device)
    for matrix in weight.detach().reshape(-1, num_outputs, num_inputs):
        whole_blocks = padded(matrix.float(), 2)
        grid = whole_blocks.reshape(-1, BLOCK, whole_blocks.shape[-1] // BLOCK, BLOCK).transpose(1, 2)
        total += _sums(grid.reshape(-1, BLOCK * BLOCK), power_of_two_scales)
    return Statistics(*total.tolist())


def gradient_statistics(gradient: Tensor) -> Statistics:
    """Return how many of a weight's gradients there are, and how many are not zero."""
    return Statistics(num_gradients=gradient.numel(), num_nonzero_gradients=int(gradient.count_nonzero()))


def _sums(x_QW: Tensor, power_of_two_scales: bool) -> Tensor:
    """Return the first seven fields of `Statistics` of fp32 blocks."""
    chunks = x_QW.split(max(1, CHUNK_NUMBERS // x_QW.shape[1]))
    return torch.stack([_chunk_sums(chunk_QW, power_of_two_scales) for chunk_QW in chunks]).sum(0)


def _chunk_sums(x_QW: Tensor, power_of_two_scales: bool) -> Tensor:
    """Return the same of few blocks."""
    amax_Q1 = x_QW.abs().amax(-1, keepdim=True)
    scale_Q1, inverse_Q1 = scale_and_inverse(amax_Q1, power_of_two_scales)
    stored_QW = round_to_e4m3_(x_QW * inverse_Q1, torch.empty_like(x_QW))
    is_number_QW = x_QW != 0
    square_Q1 = x_QW.square().sum(-1, keepdim=True)
    mean_square_Q1 = square_Q1 / is_number_QW.sum(-1, keepdim=True).clamp_min(1)
    has_numbers_Q1 = amax_Q1 > 0
    sums = (
        is_number_QW,
        (stored_QW == 0) & is_number_QW,
        stored_QW.abs() == E4M3_MAX,
        has_numbers_Q1,
        has_numbers_Q1 & (amax_Q1 >= OUTLIER_CREST * mean_square_Q1.sqrt()),
        square_Q1,
        (stored_QW * scale_Q1 - x_QW).square(),
    )
    return torch.stack([part.sum(dtype=torch.float64) for part in sums])


def fp8_statistics(model: nn.Module, loss: Callable[[], Tensor], recipe: Recipe = DEEPSEEK_RECIPE) -> Found:
    """Return the statistics of every FP8 linear layer and of the routed experts, of what `recipe` quantizes.

    Runs one forward and one backward pass of `loss`, a function that returns a scalar; gradients that the parameters
    hold are left as they were. Modules that did not run are missing, and `gradient` is where none came back; so are
    experts that lie on several processes.
    """
    found: Found = {}
    watches = [
        _Watch(name, module, recipe, found)
        for name, module in model.named_modules()
        if type(module) in WEIGHTS and getattr(module, "expert_group", None) is None
    ]
    handles = [watch.module.register_forward_hook(watch) for watch in watches]
    try:
        value = loss()
        weights = [(watch, operand, weight) for watch in watches for operand, weight in watch.weights.items()]
        gradients = torch.autograd.grad(value, [weight for _, _, weight in weights], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for (watch, operand, _), gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            watch.add_gradient(operand, gradient)
    return found


class _Watch:
    """A forward hook that fills `found` when its module runs."""

    def __init__(self, name: str, module: nn.Module, recipe: Recipe, found: Found) -> None:
        self.name, self.module, self.recipe, self.found = name, module, recipe, found
        self.weights: dict[str, nn.Parameter] = {}
        """As the forward pass uses them: gathered, where the model is sharded."""
        self.used_experts: Tensor | None = None

    def __call__(self, _: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        """Look at the input and the weights, and at the gradient when it comes back."""
        operands = self.found.setdefault(self.name, {})
        parameters = WEIGHTS[type(self.module)]
        self.weights = {operand: self.module.get_parameter(parameter) for operand, parameter in parameters.items()}
        if isinstance(self.module, DeepseekV3Experts):
            self.used_experts = inputs[1].unique()
        if self.recipe.activation_quant:
            operands["input"] = row_statistics(inputs[0], **self.recipe.blocks)
            if output.requires_grad:
                output.register_hook(self.on_gradient)
        if self.recipe.weight_quant:
            operands |= {operand: self.of_weight(weight) for operand, weight in self.weights.items()}

    def of_weight(self, weight: Tensor) -> Statistics:
        """Return the statistics of a weight as forward sees it."""
        if self.recipe.mx_blocks:
            return row_statistics(weight, **self.recipe.blocks)
        return weight_statistics(weight, self.recipe.power_of_two_scales)

    def on_gradient(self, gradient: Tensor) -> Any:
        """Look at the gradient by the module's output."""
        self.found[self.name]["gradient"] = row_statistics(gradient, **self.recipe.blocks)

    def add_gradient(self, operand: str, gradient: Tensor) -> None:
        """Look at a weight's gradient."""
        gradient = gradient if self.used_experts is None else gradient[self.used_experts]
        operands = self.found[self.name]
        operands[operand] = operands.get(operand, Statistics()) + gradient_statistics(gradient)

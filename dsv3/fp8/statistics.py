"""What block scaling does to a model's numbers: underflow, saturation, outliers and error, layer by layer.

Three things can go wrong with an FP8 tensor. Numbers far below their block's largest become zero (underflow). Numbers
pile up at the end of the range (saturation; with scales from the block itself only its largest number reaches the
end, a share of 1/128 or a little more). And a single huge number makes the rest of its block coarse (outliers): the
crest, the largest magnitude divided by the root mean square, tells how far a block is from even.

Letters: B blocks, n numbers of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dsv3.fp8.definition import BLOCK, E4M3_MAX
from dsv3.fp8.linear import LowPrecisionLinear
from dsv3.fp8.quantize import round_to_e4m3_, scale_and_inverse

OUTLIER_CREST = 8.0
"""A block counts as one with an outlier from here on; of 128 normal numbers the largest is at 2.7 on average."""


@dataclass(frozen=True)
class QuantisationStatistics:
    """Shares are between 0 and 1."""

    underflow_share: float
    """Of the numbers that are not zero, those that become zero."""
    saturation_share: float
    """Of all numbers, those stored as +-448."""
    outlier_block_share: float
    """Of all blocks, those whose largest magnitude is at least `OUTLIER_CREST` times their root mean square."""
    relative_error: float
    """Norm of the rounding error as a share of the tensor's norm."""


def row_statistics(x: Tensor) -> QuantisationStatistics:
    """Return the statistics of activations or gradients in 1x128 blocks along the last dimension."""
    padded = F.pad(x.detach().float(), (0, -x.shape[-1] % BLOCK))
    return block_statistics(padded.reshape(-1, BLOCK))


def weight_statistics(weight: Tensor) -> QuantisationStatistics:
    """Return the statistics of a weight, or a stack of weights, in 128x128 blocks."""
    num_outputs, num_inputs = weight.shape[-2:]
    padded = F.pad(weight.detach().float(), (0, -num_inputs % BLOCK, 0, -num_outputs % BLOCK))
    grid = padded.reshape(-1, BLOCK, padded.shape[-1] // BLOCK, BLOCK).transpose(1, 2)
    return block_statistics(grid.reshape(-1, BLOCK * BLOCK))


def block_statistics(x_Bn: Tensor) -> QuantisationStatistics:
    """Return the statistics of fp32 blocks; zeros, such as padding, are not counted where they would flatter."""
    amax_B1 = x_Bn.abs().amax(-1, keepdim=True)
    scale_B1, inverse_B1 = scale_and_inverse(amax_B1)
    stored_Bn = round_to_e4m3_(x_Bn * inverse_B1, torch.empty_like(x_Bn))
    is_number_Bn = x_Bn != 0
    num_numbers = is_number_Bn.sum().clamp_min(1)
    mean_square_B1 = x_Bn.square().sum(-1, keepdim=True) / is_number_Bn.sum(-1, keepdim=True).clamp_min(1)
    has_outlier_B1 = amax_B1 >= OUTLIER_CREST * mean_square_B1.sqrt()
    has_numbers_B1 = amax_B1 > 0
    error = (stored_Bn * scale_B1 - x_Bn).norm() / x_Bn.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return QuantisationStatistics(
        underflow_share=(((stored_Bn == 0) & is_number_Bn).sum() / num_numbers).item(),
        saturation_share=((stored_Bn.abs() == E4M3_MAX).sum() / num_numbers).item(),
        outlier_block_share=((has_outlier_B1 & has_numbers_B1).sum() / has_numbers_B1.sum().clamp_min(1)).item(),
        relative_error=error.item(),
    )


def fp8_statistics(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, dict[str, QuantisationStatistics]]:
    """Return statistics by layer and operand (`input`, `gradient`, `weight`) of every low-precision linear layer.

    Runs one forward and one backward pass of `loss`, a function that returns a scalar; gradients that the parameters
    hold are left as they were. `gradient` is missing where none came back.
    """
    found: dict[str, dict[str, QuantisationStatistics]] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowPrecisionLinear)}
    handles = [_watch(layer, found.setdefault(name, {})) for name, layer in layers.items()]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        torch.autograd.grad(loss(), parameters, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _watch(layer: LowPrecisionLinear, found: dict[str, QuantisationStatistics]) -> RemovableHandle:
    """Fill `found` when the layer runs; return the handle of the hook that does."""

    def on_forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found["input"] = row_statistics(inputs[0])
        found["weight"] = weight_statistics(layer.weight)
        if output.requires_grad:
            output.register_hook(on_gradient)

    def on_gradient(gradient: Tensor) -> None:
        found["gradient"] = row_statistics(gradient)

    return layer.register_forward_hook(on_forward)

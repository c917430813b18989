"""The one call that gives a model its arithmetic: which expert backend, which linear layers, and the record of both."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dsv3.fp8.convert import Conversion, convert_by_recipe, emulate_bf16
from dsv3.fp8.recipe import DEEPSEEK_RECIPE, Recipe
from dsv3.kernels.devices import multiplies_bf16
from dsv3.kernels.registry import experts_backend


@dataclass(frozen=True)
class Arithmetic:
    """How a model multiplies, as it is recorded with a run."""

    experts: str
    """Registered name of the expert backend, say dsv3_cpu_fp32 or dsv3_fp8_emulated."""
    linears: Conversion | None
    """What became of the linear layers; None: nothing, torch multiplies them."""

    @property
    def is_emulated(self) -> bool:
        """Whether any product is emulated rather than run at the precision asked for."""
        return "emulated" in self.experts or (self.linears is not None and "emulated" in self.linears.precision)


def apply_arithmetic(
    model: PreTrainedModel, experts: str, device: torch.device, compute_dtype: torch.dtype, recipe: Recipe | None
) -> Arithmetic:
    """Set the expert backend and convert the linear layers of `model`; return the record.

    `experts` is `train.experts`; `compute_dtype` fp32 or bf16; `recipe` None means no FP8. bf16 on a CPU that does not
    multiply it natively is emulated: the caller then leaves autocast off. Raises `UserError` for a backend that can't
    run.
    """
    backend = experts_backend(experts, device, compute_dtype, recipe is not None, recipe or DEEPSEEK_RECIPE)
    model.set_experts_implementation(backend)
    if recipe is not None:
        return Arithmetic(backend, convert_by_recipe(model, recipe, device))
    if compute_dtype == torch.bfloat16 and not multiplies_bf16(device):
        return Arithmetic(backend, emulate_bf16(model))
    return Arithmetic(backend, None)

"""Operands for `benchmarks.fp8_errors`: made-up ones, and those of a model while it learns.

Letters: R rows, I inputs, O outputs, B sequences, S positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv3.fp8.linear import LowPrecisionLinear
from dsv3.fp8.recipe import DEEPSEEK_RECIPE


@dataclass(frozen=True)
class Layer:
    """The operands of a linear layer's three products."""

    x_RI: Tensor
    grad_RO: Tensor
    weight_OI: Tensor


def normal_layer(outlier: float) -> Layer:
    """Return normal numbers; every 512th channel of x and 64th token's gradient are `outlier` times as large.

    The weights of those channels are as much smaller, so that each channel means as much to the output as before.
    """
    generator = torch.Generator().manual_seed(0)
    x_RI, grad_RO = (torch.randn(512, 1024, generator=generator) for _ in range(2))
    weight_OI = torch.randn(1024, 1024, generator=generator)
    x_RI[:, ::512] *= outlier
    weight_OI[:, ::512] /= outlier
    grad_RO[::64] *= outlier
    return Layer(x_RI, grad_RO, weight_OI)


def captured_layers(params: Path, tokens: Path, num_steps: int) -> dict[str, Layer]:
    """Return the operands of every linear layer that FP8 would convert, in one pass after `num_steps` of training."""
    from dsv3.kernels.convert import convert
    from dsv3.params.read import read_params
    from dsv3.training.interruption import Interruption
    from dsv3.training.loop import train
    from dsv3.training.plan import read_training_plan
    from dsv3.training.setup import prepare_model, prepare_run, start_accelerator

    parameters = read_params(params)
    section = {"max_steps": num_steps, "precision": "fp32", "use_fp8": False}
    machine = {"device": "cpu", "num_processes": 1}
    parameters = parameters.model_copy(
        update={
            "train": parameters.train.model_copy(update=section),
            "runtime": parameters.runtime.model_copy(update=machine),
        }
    )
    plan = read_training_plan(parameters, tokens)
    accelerator = start_accelerator(plan)
    model, _ = prepare_model(plan, accelerator.device)
    run = prepare_run(plan, accelerator, model, Interruption())
    train(run, [], lambda run: None)
    convert(model, DEEPSEEK_RECIPE, accelerator.device)
    tokens_BS = plan.batches.sequences(plan.total_steps * plan.sequences_per_step, plan.sequences_per_step)
    return watched(model, lambda: model(input_ids=tokens_BS[:, :-1], shift_labels=tokens_BS[:, 1:]).loss)


def watched(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Layer]:
    """Return the operands of every FP8 linear layer in one forward and backward pass of `loss`, by layer."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowPrecisionLinear)}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def on_forward(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = given[0].detach().flatten(0, -2), output

        return on_forward

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    gradients = torch.autograd.grad(loss(), [outputs[name] for name in layers])
    for handle in handles:
        handle.remove()
    return {
        name: Layer(inputs[name], gradient.flatten(0, -2), layer.weight.detach())
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True)
    }

"""Weights rounded or quantized once for several passes.

A low-precision layer makes its weights' operands anew in every forward pass, which is always right. The micro-batches
of an optimizer step multiply by the same weights; within `cached_weights` they share one set of operands. So do the
passes of a validation, and the two forward passes of a checkpointed layer.

Where the model is sharded, nothing is kept: the operands would be the whole model's, gathered.

Nothing outlives the block, and no weight may change within it: that is an error at its end. (Writes through `.data` and
torch's fused optimizers leave no trace that could be checked.) Compiled code takes the operands as inputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dsv3.fp8.linear import LowPrecisionLinear, Operands
from dsv3.kernels.registry import RegisteredBackend
from mini_model.modeling_deepseek import DeepseekV3Experts


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Round or quantize every weight of `model` once, for all passes of the block, in which no weight may change."""
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        yield
        return
    found = [(module, module_operands(module)) for module in model.modules()]
    caches: list[tuple[Any, Operands]] = [(module, operands) for module, operands in found if operands is not None]
    versions = {name: weight._version for name, weight in model.named_parameters()}
    for module, operands in caches:
        module.cached_operands = operands
    try:
        yield
    finally:
        for module, _ in caches:
            module.cached_operands = None
    changed = [name for name, weight in model.named_parameters() if weight._version != versions[name]]
    if changed:
        raise RuntimeError(f"{changed[0]} changed while its operands were cached")


@torch.no_grad()
def module_operands(module: Any) -> Operands | None:
    """Return the operands of the weights of `module` as they are now; None if it multiplies by the weights."""
    if isinstance(module, LowPrecisionLinear):
        return module.new_weight_operands()
    if isinstance(module, DeepseekV3Experts):
        config: Any = module.config
        backend = ALL_EXPERTS_FUNCTIONS.get(config._experts_implementation)
        return backend.weight_operands(module) if isinstance(backend, RegisteredBackend) else None
    return None

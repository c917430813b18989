"""Sharded training: each process holds a part of every weight, of its gradient and of its optimizer state.

A training's memory is 16 bytes per parameter (fp32 weight, gradient, two moments), the same on every process where the
model is replicated. Here torch's FSDP2 (`fully_shard`) cuts every parameter along its first dimension and gives each of
W processes one piece. A layer's pieces are gathered just before the layer runs and freed after it; in the backward pass
they are gathered again, and each process receives the sum of its piece of the gradient. Expert stacks (E, ..) are cut
between experts, so each process holds whole matrices of some experts.

Numbers do not depend on it beyond the order in which gradients are added: a training may begin on one process and go on
over four. Everything that runs the model is therefore a collective: all processes run equally many passes, or they
wait for each other without end.

torch's own engine is called directly: on a CPU, Accelerate 1.15 silently ignores its FSDP plugin. It still launches,
casts, reduces and clips. Gathering in bf16 (`MixedPrecisionPolicy`) would halve the traffic, and also round the
router's and the norms' weights; weights are gathered in fp32, and autocast rounds what it multiplies.

With `runtime.expert_parallel` a layer's experts are not gathered at all: each of N processes keeps E / N of them, and
tokens travel (`dsv3.kernels.expert_parallel`). With more processes than N, the experts of a place are cut over them.

What we give up: weights quantized once for several micro-batches (`dsv3.kernels.weight_cache`), which would keep the
whole model gathered; one gather per layer and pass more than replicas need none of.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mini_model.modeling_deepseek import DeepseekV3Experts, DeepseekV3ForCausalLM

# It warns of every gather of experts that are cut twice, which takes two steps; only checkpoints and exports do.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""Gathered on the main process, in the CPU's memory; empty on the others."""
FROM_MAIN_PROCESS = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


@dataclass(frozen=True)
class Sharding:
    """How a model is cut over the processes: section `runtime`, in which no number depends on it."""

    within_machines: bool
    """Each machine holds a whole model (hybrid)."""
    expert_parallel: int
    reshard_after_forward: bool
    offloads: bool
    """Shards lie in the CPU's memory."""


def is_sharded(model: nn.Module) -> bool:
    """Return whether this process holds parts of the model's weights."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make_device_mesh(sharding: Sharding, device: torch.device, world_size: int) -> DeviceMesh:
    """Make a mesh of the processes: one row (full), or as machines by processes of a machine (hybrid)."""
    if not sharding.within_machines:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    per_machine = int(os.environ["LOCAL_WORLD_SIZE"])
    shape = (world_size // per_machine, per_machine)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard_model(model: DeepseekV3ForCausalLM, sharding: Sharding, device: torch.device) -> None:
    """Cut the model's parameters over the processes, in place, and fill them with the main process's weights.

    On the others the model has no memory yet (device meta). An optimizer is made after this: parameters are replaced.
    """
    is_main_process = dist.get_rank() == 0
    weights: dict[str, Any] = dict(model.state_dict()) if is_main_process else {}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()} if is_main_process else {}
    mesh = make_device_mesh(sharding, device, dist.get_world_size())
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if sharding.offloads else OffloadPolicy()
    options = {"mesh": mesh, "reshard_after_forward": sharding.reshard_after_forward, "offload_policy": offload}
    if sharding.expert_parallel > 1:
        options["ignored_params"] = share_experts(model, sharding, device, options)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)  # the rest: embedding, last norm, head; gathered throughout the forward pass
    weights_device = torch.device("cpu") if sharding.offloads else device
    model.to_empty(device=weights_device)
    model.tie_weights()
    set_model_state_dict(model, weights, options=FROM_MAIN_PROCESS)
    fill_buffers(model, buffers, device)


def share_experts(
    model: DeepseekV3ForCausalLM, sharding: Sharding, device: torch.device, options: dict[str, Any]
) -> set[nn.Parameter]:
    """Give each process of a row of `runtime.expert_parallel` its experts; return the stacks that are not cut further.

    With several rows, a row's experts are cut over the processes of the same place in each, as other weights are.
    """
    num_rows = dist.get_world_size() // sharding.expert_parallel
    shape, names = (num_rows, sharding.expert_parallel), ("rows", "experts")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    mesh._flatten("all")  # norms are then summed over all processes at once
    stacks: set[nn.Parameter] = set()
    layers: list[Any] = [module for module in model.modules() if isinstance(module, DeepseekV3Experts)]
    for experts in layers:
        experts.expert_group = mesh.get_group("experts")
        for name, stack in list(experts.named_parameters(recurse=False)):
            shared = distribute_tensor(stack.data, mesh["experts"], [Shard(0)], src_data_rank=None)
            setattr(experts, name, nn.Parameter(shared))
        if num_rows > 1:
            fully_shard(experts, **{**options, "mesh": mesh["rows"]})
        stacks |= set(experts.parameters(recurse=False))
    return set() if num_rows > 1 else stacks


def fill_buffers(model: nn.Module, buffers: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the main process's `buffers` into every process's model, on `device`; checkpoints lack some of them."""
    for module_name, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            filled = torch.empty_like(buffer, device=device)
            if buffers:
                filled.copy_(buffers[f"{module_name}.{name}".lstrip(".")])
            dist.broadcast(filled, src=0)
            setattr(module, name, filled)


def gather_weights(model: nn.Module) -> dict[str, Any]:
    """Gather the whole model's weights on the main process, on the CPU; an empty dict on the others. A collective."""
    return get_model_state_dict(model, options=WHOLE)


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of `whole`, which every process has, cut as `parameter` is."""
    if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
        return whole
    on_device = whole.to(parameter.to_local().device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)

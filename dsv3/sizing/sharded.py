"""What one of several processes needs, where they share a training's state, and which sharing fits their devices.

Sharing cuts what is there all the time: weights, gradients and the optimizer's moments (`dsv3.training.sharding`). The
activations of a process's own sequences it does not cut. It costs room for what is *gathered*: embedding, last norm and
head throughout a pass, and, while a layer runs, its weights, those of the next one, which are fetched meanwhile, and in
the backward pass the layer's gradients twice, as they are computed and as they are sent.

A stack of experts is cut between experts, so a process holds whole ones: of 8 experts over 3 processes up to 3.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from dsv3.params.architecture import Architecture
from dsv3.params.optimizers import OPTIMIZERS
from dsv3.params.runtime import Device
from dsv3.params.train import TrainParams
from dsv3.sizing.activations import DTYPE_BYTES, FP32, INT64, all_layers
from dsv3.sizing.memory import TrainingMemory, num_matrix_parameters, training_memory
from dsv3.sizing.parameters import block_parameters, mtp_parameters_by_part, num_router_biases, parameters_by_part

PER_MACHINE = 8
"""GPUs of a machine, where that isn't known."""

Sharding = Literal["none", "full", "hybrid"]


@dataclass(frozen=True)
class Sharing:
    """How many processes hold one copy of a training's state together."""

    num_shards: int
    expert_parallel: int = 1
    """Of these, processes among which tokens travel to the experts."""
    reshard_after_forward: bool = True

    def own(self, a: Architecture, parts: Counter[str]) -> int:
        """Return the most that a process holds of parameters, given by part."""
        experts = parts["routed_experts"]
        others = sum(parts.values()) - experts
        return -(-others // self.num_shards) + experts // a.n_routed_experts * -(-a.n_routed_experts // self.num_shards)

    def gathered(self, a: Architecture, parts: Counter[str]) -> int:
        """Return what a process holds of parameters while they are used; with expert parallelism some experts only."""
        experts = parts["routed_experts"]
        return sum(parts.values()) - experts + experts // self.expert_parallel


def sharded_memory(a: Architecture, train: TrainParams, device: Device, sharing: Sharing) -> TrainingMemory:
    """Return what one process needs of a training that `sharing.num_shards` processes share."""
    whole = training_memory(a, train, device)
    own_experts = a.model_copy(update={"n_routed_experts": a.n_routed_experts // sharing.expert_parallel})
    of_own_experts = training_memory(own_experts, train, device)  # whose weights are cast, and quantized
    parts = parameters_by_part(a) + mtp_parameters_by_part(a)
    own, matrices = sharing.own(a, parts), num_matrix_parameters(a)
    own_of_adamw = -(-(sum(parts.values()) - matrices) // sharing.num_shards)
    moments = OPTIMIZERS["adamw"].moments * own_of_adamw + OPTIMIZERS[train.optim].moments * (own - own_of_adamw)
    return replace(
        whole,
        weights_bytes=FP32 * own + (FP32 + INT64) * num_router_biases(a),
        gradients_bytes=FP32 * own,
        optimizer_states_bytes=DTYPE_BYTES[train.adam_moments_dtype] * moments,
        recomputed_bytes=of_own_experts.recomputed_bytes,
        weight_casts_bytes=of_own_experts.weight_casts_bytes,
        derived_weights_bytes=of_own_experts.derived_weights_bytes,
        optimizer_workspace_bytes=whole.optimizer_workspace_bytes // sharing.num_shards,
        gathered_bytes=gathered_bytes(a, sharing),
    )


def gathered_bytes(a: Architecture, sharing: Sharing) -> int:
    """Return what lies gathered at most: two layers' weights (or all), one's gradients twice; the rest with its own."""
    layers = [sharing.gathered(a, block_parameters(a, layer)) for layer in all_layers(a)]
    root = (1 if a.tie_word_embeddings else 2) * a.vocab_size * a.hidden_size + a.hidden_size
    weights = sum(sorted(layers)[-2:]) if sharing.reshard_after_forward else sum(layers)
    return FP32 * (2 * root + weights + 2 * max(layers))


def replicated_memory(a: Architecture, train: TrainParams, device: Device) -> TrainingMemory:
    """Return what one of several processes needs that each hold everything: gradients are exchanged from buckets."""
    whole = training_memory(a, train, device)
    return replace(whole, gathered_bytes=whole.gradients_bytes)


def process_memory(a: Architecture, train: TrainParams, device: Device, sharing: Sharing | None) -> TrainingMemory:
    """Return what one of several processes needs; `sharing` None: each holds everything."""
    return replicated_memory(a, train, device) if sharing is None else sharded_memory(a, train, device, sharing)


def ways_of_sharing(a: Architecture, num_processes: int) -> dict[str, Sharing | None]:
    """Return how so many processes can share a training, by what `runtime` says; machines have `PER_MACHINE`."""
    ways: dict[str, Sharing | None] = {"none": None}
    if num_processes == 1:
        return ways
    if num_processes > PER_MACHINE and num_processes % PER_MACHINE == 0:
        ways["hybrid"] = Sharing(PER_MACHINE)
    ways["full"] = Sharing(num_processes)
    expert_parallel = math.gcd(num_processes, a.n_routed_experts)
    if a.num_moe_layers and expert_parallel > 1:
        ways[f"full, expert_parallel {expert_parallel}"] = Sharing(num_processes, expert_parallel)
    return ways


def chosen_sharding(
    a: Architecture, train: TrainParams, device: Device, processes: tuple[int, int], usable_bytes: int
) -> Sharding:
    """Return what `runtime.sharding: auto` comes to for (all, per machine) `processes` with `usable_bytes` each.

    The less is exchanged, the better: copies where they fit, else copies per machine where these fit, else one copy.
    """
    num_processes, per_machine = processes
    if num_processes == 1 or process_memory(a, train, device, None).peak_bytes <= usable_bytes:
        return "none"
    has_machines = 1 < per_machine < num_processes and num_processes % per_machine == 0
    if has_machines and process_memory(a, train, device, Sharing(per_machine)).peak_bytes <= usable_bytes:
        return "hybrid"
    return "full"

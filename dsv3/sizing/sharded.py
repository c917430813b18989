"""What one of several processes needs, where they share a training's state, and which sharing fits their devices.

Sharing cuts what is there all the time: weights, gradients and the optimizer's moments (`dsv3.training.sharding`). The
activations of a process's own sequences it does not cut. It costs room for what is *gathered*, which comes and goes:
embedding, last norm and head stay throughout a pass, a layer's weights while it runs. The backward pass holds most.
While it is in a layer, that layer's weights are there and, more and more, its whole gradient; the weights of the layer
below, which are fetched meanwhile; and the whole gradient of the layer above, which is being sent. The activations of
the layers above are gone by then. So the peak is the largest of some sums, several for each layer
(`ShardedPass.held_at_each_point`), not a sum of largest terms.

A stack of experts is cut between experts, so a process holds whole ones: of 8 experts over 3 processes up to 3. Left
out is what a library of collectives allocates for itself. Experts that stay where they are (`runtime.expert_parallel`)
are taken to be chosen equally often; those of one process may get more tokens, and their activations are as many more.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dsv3.params.architecture import Architecture
from dsv3.params.optimizers import OPTIMIZERS
from dsv3.params.runtime import Device
from dsv3.params.train import TrainParams
from dsv3.sizing.activations import (
    DTYPE_BYTES,
    FP32,
    INT64,
    Workload,
    activation_bytes,
    all_layers,
    attention_backward_bytes,
    head_cast_bytes,
    kept_bytes,
    layer_bytes,
    layer_cast_bytes,
    layer_derived_bytes,
    logits_bytes,
)
from dsv3.sizing.memory import (
    TrainingMemory,
    average_bytes,
    num_matrix_parameters,
    optimizer_workspace_bytes,
    training_memory,
    workload,
)
from dsv3.sizing.parameters import block_parameters, mtp_parameters_by_part, num_router_biases, parameters_by_part

PER_MACHINE = 8
"""GPUs of a machine, where that isn't known."""

ShardingMode = Literal["none", "full", "hybrid"]


@dataclass(frozen=True)
class StateSharing:
    """How processes hold a training's state."""

    num_shards: int
    """Processes that hold one copy together."""
    expert_parallel: int = 1
    """Of these, processes among which tokens travel to the experts."""
    reshard_after_forward: bool = True
    num_copies: int = 1
    """Copies of the state, each held by other processes."""

    @property
    def num_processes(self) -> int:
        """All processes."""
        return self.num_shards * self.num_copies

    def own(self, a: Architecture, parts: Counter[str]) -> int:
        """Return the most that a process holds of parameters, given by part."""
        experts = parts["routed_experts"]
        others = sum(parts.values()) - experts
        return -(-others // self.num_shards) + experts // a.n_routed_experts * -(-a.n_routed_experts // self.num_shards)

    def gathered(self, a: Architecture, parts: Counter[str]) -> int:
        """Return what a process gathers of parameters while they are used.

        With expert parallelism that is, of the experts, what other rows of processes hold of this one's.
        """
        experts = parts["routed_experts"]
        return sum(parts.values()) - experts + (0 if self.keeps_experts else experts // self.expert_parallel)

    @property
    def keeps_experts(self) -> bool:
        """Whether all processes have experts of their own, which no other has."""
        return self.num_shards == self.expert_parallel > 1


@dataclass(frozen=True)
class HeldLayer:
    """What a process holds of one layer, in bytes."""

    weights: int
    """Gathered. As much is the gradient by them, before it is cut and while it is sent."""
    first_gradients: int
    """What is computed while all that the layer keeps is still there: the gradient by routed experts, or by the outputs
    of a dense layer's gate and up projections."""
    gradient_before_attention: int
    """Of the gradient by weights, what exists when the backward pass of attention begins."""
    gradient_of_own_experts: int
    """The gradient by experts that are not gathered."""
    kept: int
    """Activations and copies of weights, until its backward pass."""
    running: int
    """The same as its backward pass begins: computed again, with gradient checkpointing."""
    in_attention: int
    """The same while its backward pass is in attention."""


def held_layer(a: Architecture, w: Workload, sharing: StateSharing, number: int) -> HeldLayer:
    """Return what a process holds of layer `number`."""
    parts = block_parameters(a, number)
    weights = FP32 * sharing.gathered(a, parts)
    own = a.model_copy(update={"n_routed_experts": a.n_routed_experts // sharing.expert_parallel})
    copies = layer_cast_bytes(own, w, number) + layer_derived_bytes(own, w, number)
    # Rows that have travelled to their experts, which else read the tokens' own.
    rows = w.num_tokens * a.num_experts_per_tok if sharing.expert_parallel > 1 and a.is_moe(number) else 0
    running = layer_bytes(a, w, number) + FP32 * rows * a.hidden_size + copies
    own_experts = FP32 * parts["routed_experts"] // sharing.num_shards if sharing.keeps_experts else 0
    gathered_experts = FP32 * sharing.gathered(a, Counter(routed_experts=parts["routed_experts"]))
    outputs = 0 if a.is_moe(number) else 2 * w.num_tokens * a.intermediate_size * w.compute_bytes
    return HeldLayer(
        weights=weights,
        first_gradients=gathered_experts + own_experts + outputs,
        gradient_before_attention=max(0, weights - FP32 * parts["attention"]),
        gradient_of_own_experts=own_experts,
        kept=kept_bytes(a, w, number) if w.gradient_checkpointing else running,
        running=running,
        in_attention=attention_backward_bytes(a, w, number),
    )


@dataclass(frozen=True)
class ShardedPass:
    """A forward and backward pass of a process, by what it holds at each point of it, in bytes."""

    sharing: StateSharing
    layers: Sequence[HeldLayer]
    root: int
    """Embedding, last norm and head, gathered throughout."""
    head: int
    """The head alone, whose gradient is there from the beginning of the backward pass to its end."""
    logits: int
    """Output head and loss."""
    others: int
    """Activations that belong to no layer."""
    gradients: int
    """This process's part of the gradients of earlier passes."""

    def held_at_each_point(self) -> Iterator[int]:
        """Yield what there is in each layer's forward pass, in the loss, in each layer's backward pass, at the end."""
        always = self.others + self.root
        for number, layer in enumerate(self.layers):
            # A layer's weights come in one piece, which is freed when the next layer's have been cut out of theirs.
            pieces = sum(other.weights for other in self.layers[max(0, number - 1) : number + 1])
            gathered = layer.weights + self.stays_after_forward(number) + pieces
            yield always + self.gradients + gathered + self.kept_below(number)
        end, last = len(self.layers), self.layers[-1].weights
        yield always + self.gradients + self.logits + self.stays_after_forward(end) + last + self.kept_below(end)
        for number, layer in enumerate(self.layers):
            gathered = self.gathered_beside(number) + layer.weights
            there = self.others + self.gradients_above(number) + gathered + self.kept_below(number)
            own = layer.gradient_of_own_experts
            yield there + layer.running + layer.first_gradients
            yield there + layer.in_attention + layer.gradient_before_attention + own
            yield there + layer.weights + own
        yield self.gathered_at_the_end() + self.gradients_above(-1)

    def kept_below(self, number: int) -> int:
        """Return the activations of the layers below `number`."""
        return sum(layer.kept for layer in self.layers[:number])

    def stays_after_forward(self, number: int) -> int:
        """Return the weights that stay gathered of the layers below `number`."""
        return 0 if self.sharing.reshard_after_forward else sum(layer.weights for layer in self.layers[:number])

    def gathered_beside(self, number: int) -> int:
        """Return what is gathered while the backward pass is in layer `number`, beside what is that layer's."""
        below = [layer.weights for layer in self.layers[:number]]
        above = [layer.weights for layer in self.layers[number + 1 :]]
        fetched = sum(below[-1:] if self.sharing.reshard_after_forward else below)
        return self.root + self.head + fetched + sum(above[:1])

    def gathered_at_the_end(self) -> int:
        """Return what is gathered when the first layer's gradient is being sent, or then the root's."""
        return 2 * self.root + self.layers[0].weights

    def gathered(self) -> int:
        """Return the most that is gathered at any point of the backward pass."""
        in_layers = (self.gathered_beside(number) + 2 * layer.weights for number, layer in enumerate(self.layers))
        return max(*in_layers, self.gathered_at_the_end())

    def gradients_above(self, number: int) -> int:
        """Return this process's part of the gradients while only the layers above `number` have theirs of this pass."""
        new = sum(layer.weights // self.sharing.num_shards for layer in self.layers[number + 1 :])
        if not self.gradients:
            return new + sum(layer.gradient_of_own_experts for layer in self.layers[number + 1 :])
        exchanged = new if self.sharing.num_copies > 1 else 0  # between copies, and held until the pass ends
        return self.gradients + exchanged


def sharded_pass(a: Architecture, w: Workload, sharing: StateSharing, gradients: int) -> ShardedPass:
    """Return a pass of one of several processes that holds `gradients` bytes of earlier ones."""
    layers = [held_layer(a, w, sharing, number) for number in all_layers(a)]
    head = FP32 * a.vocab_size * a.hidden_size
    return ShardedPass(
        sharing=sharing,
        layers=layers,
        root=head * (1 if a.tie_word_embeddings else 2) + FP32 * a.hidden_size,
        head=head,
        logits=logits_bytes(a, w) + head_cast_bytes(a, w),
        others=activation_bytes(a, w) - sum(kept_bytes(a, w, number) for number in all_layers(a)),
        gradients=gradients,
    )


@dataclass(frozen=True)
class ShardedMemory(TrainingMemory):
    """What one of several processes needs; weights, gradients and moments are its own part."""

    largest_point_bytes: int = 0

    @property
    def pass_bytes(self) -> int:
        """The most that a forward and backward pass hold beside what is always there."""
        return self.largest_point_bytes


def sharded_memory(a: Architecture, train: TrainParams, device: Device, sharing: StateSharing) -> ShardedMemory:
    """Return what one process needs of a training that `sharing.num_shards` processes share."""
    whole, w = training_memory(a, train, device), workload(train, device)
    parts = parameters_by_part(a) + mtp_parameters_by_part(a)
    own, matrices = sharing.own(a, parts), num_matrix_parameters(a)
    own_of_adamw = -(-(sum(parts.values()) - matrices) // sharing.num_shards)
    moments = OPTIMIZERS["adamw"].moments * own_of_adamw + OPTIMIZERS[train.optim].moments * (own - own_of_adamw)
    holds_gradients = accumulates(train, sharing)
    of_pass = sharded_pass(a, w, sharing, FP32 * own if holds_gradients else 0)
    return ShardedMemory(
        weights_bytes=FP32 * own + (FP32 + INT64) * num_router_biases(a),
        optimizer_states_bytes=DTYPE_BYTES[train.adam_moments_dtype] * moments + average_bytes(train, own),
        gradients_bytes=FP32 * own,
        activations_bytes=whole.activations_bytes,
        recomputed_bytes=whole.recomputed_bytes,
        weight_casts_bytes=whole.weight_casts_bytes,
        derived_weights_bytes=0,  # made anew in each pass: among what a layer keeps
        logits_bytes=whole.logits_bytes,
        optimizer_workspace_bytes=optimizer_workspace_bytes(a, train, w.compute_bytes, sharing.num_shards),
        holds_gradients=holds_gradients,
        teachers_bytes=whole.teachers_bytes,
        gathered_bytes=of_pass.gathered(),
        largest_point_bytes=max(of_pass.held_at_each_point()),
    )


def accumulates(train: TrainParams, sharing: StateSharing) -> bool:
    """Return whether a process makes several of an optimizer step's passes, which the processes share."""
    return train.gradient_accumulation_steps > sharing.num_processes


def replicated_memory(a: Architecture, train: TrainParams, device: Device, sharing: StateSharing) -> TrainingMemory:
    """Return what one of several processes needs that each hold everything.

    Gradients are exchanged from buckets, which are there from the beginning: they are the gradients, but for those that
    are accumulated before the exchange.
    """
    whole = training_memory(a, train, device)
    accumulated = whole.gradients_bytes if accumulates(train, sharing) else 0
    return replace(whole, holds_gradients=True, gathered_bytes=accumulated)


def process_memory(a: Architecture, train: TrainParams, device: Device, sharing: StateSharing) -> TrainingMemory:
    """Return what one of several processes needs."""
    of_process = replicated_memory if sharing.num_shards == 1 else sharded_memory
    return of_process(a, train, device, sharing)


def ways_of_sharing(a: Architecture, num_processes: int) -> dict[str, StateSharing]:
    """Return how so many processes can share a training, by what `runtime` says; machines have `PER_MACHINE`."""
    ways = {"none": StateSharing(1, num_copies=num_processes)}
    if num_processes == 1:
        return ways
    if num_processes > PER_MACHINE and num_processes % PER_MACHINE == 0:
        ways["hybrid"] = StateSharing(PER_MACHINE, num_copies=num_processes // PER_MACHINE)
    ways["full"] = StateSharing(num_processes)
    expert_parallel = math.gcd(num_processes, a.n_routed_experts)
    if a.num_moe_layers and expert_parallel > 1:
        ways[f"full, expert_parallel {expert_parallel}"] = StateSharing(num_processes, expert_parallel)
    return ways


def chosen_sharding(
    a: Architecture, train: TrainParams, device: Device, processes: tuple[int, int], usable_bytes: int
) -> ShardingMode:
    """Return what `runtime.sharding: auto` chooses for (all, per machine) `processes` with `usable_bytes` each.

    The less is exchanged, the better: copies where they fit, else copies per machine where these fit, else one copy.
    """
    num_processes, per_machine = processes
    ways: dict[ShardingMode, StateSharing] = {"none": StateSharing(1, num_copies=num_processes)}
    if 1 < per_machine < num_processes and num_processes % per_machine == 0:
        ways["hybrid"] = StateSharing(per_machine, num_copies=num_processes // per_machine)
    if num_processes == 1:
        return "none"
    for way, sharing in ways.items():
        if process_memory(a, train, device, sharing).peak_bytes <= usable_bytes:
            return way
    return "full"

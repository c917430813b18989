"""Routings that break careless kernels, and the comparison that all backends go through.

Letters: T tokens, K num_experts_per_tok, E n_routed_experts, D hidden_size, F intermediate_size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROUTINGS = ["random", "empty experts", "one expert", "ragged", "one token", "no tokens"]


@dataclass
class Case:
    """Inputs of an expert computation, and the gradient that comes back to it."""

    hidden: Tensor
    index: Tensor
    weight: Tensor
    gate_up: Tensor
    down: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        moved = {name: value.to(dtype) for name, value in vars(self).items() if name != "index"}
        return Case(index=self.index, **moved)

    def on(self, device: torch.device) -> "Case":
        return Case(**{name: value.to(device) for name, value in vars(self).items()})


def case(routing: str, hidden_size: int = 24, intermediate_size: int = 16, num_experts: int = 5, seed: int = 0) -> Case:
    """Return a case in fp32 with two experts per token."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = {"one token": 1, "no tokens": 0}.get(routing, 37)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Case(
        hidden=normal(num_tokens, hidden_size),
        index=routed(routing, num_tokens, num_experts, generator),
        weight=torch.rand(num_tokens, 2, generator=generator) + 0.1,
        gate_up=normal(num_experts, 2 * intermediate_size, hidden_size) * hidden_size**-0.5,
        down=normal(num_experts, hidden_size, intermediate_size) * intermediate_size**-0.5,
        grad=normal(num_tokens, hidden_size),
    )


def routed(routing: str, num_tokens: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """Return the chosen experts (T, 2)."""
    if routing == "one expert":  # the second choice must differ from the first, as routers do it
        return torch.tensor([[1, 3]]).repeat(num_tokens, 1)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    if routing == "empty experts":
        scores[:, [0, num_experts - 1]] = -1
    if routing == "ragged":
        scores += torch.linspace(0, 1.5, num_experts)
    return scores.topk(2).indices


def results(experts: Callable[..., Tensor], inputs: Case) -> dict[str, Tensor]:
    """Return the output and all four gradients of a backend."""
    leaves = {
        name: getattr(inputs, name).detach().clone().requires_grad_()
        for name in ("hidden", "weight", "gate_up", "down")
    }
    output = experts(leaves["hidden"], inputs.index, leaves["weight"], leaves["gate_up"], leaves["down"])
    output.backward(inputs.grad)
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Return the norm of the difference as a share of the norm of the truth (absolute where that is zero).

    Infinite where it is not a number, because comparisons and max() let NaN pass.
    """
    difference = (value.double() - truth.double()).norm().item()
    size = truth.double().norm().item()
    error = difference / size if size else difference
    return error if error == error else float("inf")


def errors(value: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative error of the output and of each gradient."""
    return {name: relative_error(value[name], truth[name]) for name in truth}

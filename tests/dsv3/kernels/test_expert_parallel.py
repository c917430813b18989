"""Experts on two processes beside all of them on one, over gloo; as a module, this file is the program that runs."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dsv3.kernels import reference
from dsv3.kernels.expert_parallel import dispatch_and_combine, own_weight
from tests.training_inputs import run_python

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 4, 8, 6, 10
ROUTINGS = {
    "to both": [0, 1, 2, 3],
    "to the first process": [0, 1],
    "to one expert of the second": [3, 3],
}
"""Experts among which tokens choose; with the second and third one process has no row."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("experts")
    done = run_python(folder, "-m", "tests.dsv3.kernels.test_expert_parallel", str(folder), timeout_s=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return {f"{rank} {routing}": found for rank in (0, 1) for routing, found in ranks[rank].items()}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_output_and_every_gradient_are_those_of_experts_on_one_process(measured, rank, routing):
    """Also those of the weights by which the router takes part, and of experts that got no row: zeros, not none."""
    found = measured[f"{rank} {routing}"]
    assert set(found) == {"output", "hidden", "router's weights", "gate_up", "down"}
    for name, difference in found.items():
        assert difference < 1e-6, name  # a NaN is no smaller


def inputs(rank: int, routing: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden states, choices and weights of a process's tokens."""
    generator = torch.Generator().manual_seed(7 * rank + len(routing))
    experts = torch.tensor(ROUTINGS[routing])
    index_TK = experts[torch.randint(len(experts), (TOKENS, 2), generator=generator)]
    hidden_TD = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    return hidden_TD, index_TK, torch.rand(TOKENS, 2, generator=generator).requires_grad_()


def weights() -> list[Tensor]:
    """Return the stacks of all experts, gate and up, and down."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def differences(routing: str) -> dict[str, float]:
    """Return how far this process's results are from those of one that has all experts, and all tokens."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("experts",))
    group = mesh.get_group("experts")
    shared = [distribute_tensor(w.detach(), mesh, [Shard(0)], src_data_rank=None).requires_grad_() for w in weights()]
    own = [own_weight(w, group) for w in shared]
    hidden, index, weight = inputs(rank, routing)
    output = dispatch_and_combine(lambda *rows: reference.experts(*rows, *own), hidden, index, weight, EXPERTS, group)
    output.square().sum().backward()

    whole = weights()
    for other in range(size):
        theirs = inputs(other, routing)
        expected = reference.experts(theirs[0], theirs[1], theirs[2], *whole)
        expected.square().sum().backward()
        if other == rank:
            found = {"output": (output, expected), "hidden": (hidden.grad, theirs[0].grad)}
            found["router's weights"] = weight.grad, theirs[2].grad
    for name, part, full in zip(("gate_up", "down"), shared, whole, strict=True):
        mean = full.grad / size  # as the loss is a mean over the processes
        found[name] = part.grad.to_local(), mean.chunk(size)[rank]
    return {
        name: ((is_ - of_one).norm() / of_one.norm().clamp(min=1e-9)).item() for name, (is_, of_one) in found.items()
    }


def main(folder: Path) -> None:
    """Compare all routings on two processes."""
    from tests.dsv3.training.test_sharding import fork

    def work() -> None:
        dist.init_process_group("gloo")
        found = {routing: differences(routing) for routing in ROUTINGS}
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        dist.barrier()

    fork(2, work)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

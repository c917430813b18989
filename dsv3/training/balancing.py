"""Auxiliary-loss-free load balancing: a bias per expert, updated after every optimizer step.

An auxiliary loss that rewards balance also changes what the experts learn. DeepSeek-V3 instead adds a bias to each
expert's affinity, for the choice only. After every optimizer step the bias of an expert with more tokens than the mean
of its layer is lowered, that of an expert with fewer is raised, by the load of the whole batch (report, section 2.1.2;
arXiv 2408.15664).

The routers count in the forward pass, once per token even where activation checkpointing repeats it. Here the counts of
all micro-batches and all processes are added up, used, and zeroed.

Letters: L layers, E n_routed_experts
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv3.evaluation.load_balance import load_entropy, max_vio, num_dead_experts
from mini_model.modeling_deepseek import DeepseekV3TopkRouter

Routers = Sequence[tuple[int, DeepseekV3TopkRouter]]


@torch.no_grad()
def pop_expert_load(routers: Routers, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the counts of all routers as int64 (L, E), summed over processes by `all_reduce`; zero the counts."""
    if not routers:
        return torch.zeros(0, 1, dtype=torch.int64)  # L is 0; E must not be, or there would be no largest load
    load_LE = torch.stack([router.expert_load for _, router in routers])
    for _, router in routers:
        router.expert_load.zero_()
    return all_reduce(load_LE)


@torch.no_grad()
def update_router_bias(routers: Routers, load_LE: Tensor, rate: float) -> None:
    """Lower the bias of experts with more tokens than their layer's mean, raise that of experts with fewer.

        bias <- bias + rate * sign(mean(load) - load)

    Only the sign counts: a step in proportion to the load would grow with the size of the batch. The bias of an expert
    exactly at the mean stays.
    """
    if rate == 0 or not routers:
        return
    # In integers: sum - E * load has the sign of mean - load, and no rounding.
    direction_LE = (load_LE.sum(dim=1, keepdim=True) - load_LE.shape[1] * load_LE).sign()
    for (_, router), direction_E in zip(routers, direction_LE, strict=True):
        router.e_score_correction_bias.add_(direction_E, alpha=rate)


@torch.no_grad()
def router_rows(
    routers: Routers, load_LE: Tensor, batch_max_vio_L: Sequence[float], step: int
) -> list[dict[str, int | float | str]]:
    """Return one row of the router table per layer, for the loads counted since the last rows.

    `batch_max_vio_L` is the mean of MaxVio over single batches. It is larger than MaxVio of the summed loads, because
    the imbalances of different batches partly cancel.
    """
    if not routers:
        return []
    load_LE = load_LE.cpu()
    bias_LE = torch.stack([router.e_score_correction_bias for _, router in routers]).cpu()
    columns = {
        "max_vio": max_vio(load_LE),
        "max_vio_batch": torch.tensor(batch_max_vio_L),
        "entropy": load_entropy(load_LE),
        "dead_experts": num_dead_experts(load_LE),
        "bias_min": bias_LE.amin(dim=1),
        "bias_max": bias_LE.amax(dim=1),
    }
    share_LE = (load_LE / load_LE.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
    return [
        {
            "step": step,
            "layer": layer,
            **{name: column[index].item() for name, column in columns.items()},
            "load_shares": " ".join(f"{share:.4f}" for share in share_LE[index]),
        }
        for index, (layer, _) in enumerate(routers)
    ]

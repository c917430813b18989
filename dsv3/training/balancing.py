"""Loss-free balancing: how the router's bias is steered so that no expert starves.

An auxiliary loss that rewards balance also pulls on what the experts learn. DeepSeek-V3 instead adds a bias to each
expert's affinity, for the choice only: whoever was busier than the mean of its layer gets a little less, whoever was
idler a little more, once per optimizer step, from the load of the whole batch (report, section 2.1.2; arXiv
2408.15664).

The routers count in the forward pass, once per token even where activation checkpointing repeats it. Here the counts of
all micro-batches and all processes are added up, used, and zeroed.

Letters: L layers with a router (prediction modules included), E n_routed_experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mini_model.modeling_deepseek import DeepseekV3TopkRouter

Routers = Sequence[tuple[int, DeepseekV3TopkRouter]]


@torch.no_grad()
def taken_loads(routers: Routers, summed: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the counts of all routers as int64 (L, E), added up over processes by `summed`; zero the routers' own."""
    if not routers:
        return torch.zeros(0, 1, dtype=torch.int64)  # of no layers; a largest load needs experts to look at
    load_LE = torch.stack([router.expert_load for _, router in routers])
    for _, router in routers:
        router.expert_load.zero_()
    return summed(load_LE)


@torch.no_grad()
def update_router_bias(routers: Routers, load_LE: Tensor, rate: float) -> None:
    """Lower the bias of experts busier than their layer's mean, raise that of the idler ones.

        bias <- bias + rate * sign(mean(load) - load)

    Only the sign counts: a fixed step cannot overshoot with the size of the batch, as a proportional one does. An
    expert exactly at the mean stays where it is.
    """
    if rate == 0 or not routers:
        return
    # In integers: sum - E * load has the sign of mean - load, and no rounding.
    direction_LE = (load_LE.sum(dim=1, keepdim=True) - load_LE.shape[1] * load_LE).sign()
    for (_, router), direction_E in zip(routers, direction_LE, strict=True):
        router.e_score_correction_bias.add_(direction_E, alpha=rate)


def max_vio(load_LE: Tensor) -> Tensor:
    """Return (largest load - mean load) / mean load of each layer: 0 at perfect balance, E - 1 at collapse."""
    load_LE = load_LE.double()
    mean_L = load_LE.mean(dim=1)
    return (load_LE.amax(dim=1) - mean_L) / mean_L.clamp(min=1e-12)


def load_entropy(load_LE: Tensor) -> Tensor:
    """Return the entropy in nats of each layer's distribution of tokens over experts; ln E at perfect balance."""
    load_LE = load_LE.double()
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.special.entr(share_LE).sum(dim=1)


@torch.no_grad()
def router_rows(
    routers: Routers, load_LE: Tensor, batch_max_vio_L: Sequence[float], step: int
) -> list[dict[str, int | float]]:
    """Return one row of the router table per layer: for the loads counted since the rows before, and MaxVio per batch.

    The second is larger: what one batch has too much of, the next has too little of.
    """
    if not routers:
        return []
    load_LE = load_LE.cpu()
    bias_LE = torch.stack([router.e_score_correction_bias for _, router in routers]).cpu()
    columns = {
        "max_vio": max_vio(load_LE),
        "max_vio_batch": torch.tensor(batch_max_vio_L),
        "entropy": load_entropy(load_LE),
        "dead_experts": (load_LE == 0).sum(dim=1),
        "bias_min": bias_LE.amin(dim=1),
        "bias_max": bias_LE.amax(dim=1),
    }
    return [
        {"step": step, "layer": layer, **{name: column[index].item() for name, column in columns.items()}}
        for index, (layer, _) in enumerate(routers)
    ]

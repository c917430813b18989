"""How evenly a model's experts are used, counted by the routers in the exported code.

Letters: E routed experts of a layer.
"""

from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import PreTrainedModel

Floats = npt.NDArray[np.float64]


class Router(Protocol):
    """A router that counts the tokens it sends to each of its experts."""

    expert_load: Tensor


class CountsExpertLoad(Protocol):
    """What the exported code offers beyond transformers' interface."""

    def set_count_expert_load(self, enabled: bool) -> None:
        """Count in evaluation mode too."""
        ...

    def routers(self) -> list[tuple[int, Router]]:
        """Return (layer, router) of each mixture-of-experts layer."""
        ...


class ExpertLoad:
    """Counts, per layer, how many tokens each routed expert gets while the block runs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._counting = cast(CountsExpertLoad, model)
        self._routers = self._counting.routers()
        self.counts: dict[int, Floats] = {}
        """Layer to loads (one number per expert), of the layers that routed anything; filled when the block ends."""

    def __enter__(self) -> "ExpertLoad":
        self._counting.set_count_expert_load(True)
        for _, router in self._routers:
            router.expert_load.zero_()
        return self

    def __exit__(self, *_: object) -> None:
        self._counting.set_count_expert_load(False)
        loads = {layer: router.expert_load.double().cpu().numpy().copy() for layer, router in self._routers}
        self.counts = {layer: load for layer, load in loads.items() if load.any()}


def router_metrics(load_E: Floats) -> dict[str, float | int]:
    """Return how evenly one layer's experts were used, under the vocabulary's names."""
    share_E = load_E / load_E.sum()
    used_E = share_E[share_E > 0]
    return {
        "max_vio_global": float(load_E.max() / load_E.mean() - 1),
        "entropy": float(-(used_E * np.log(used_E)).sum()),
        "dead_experts": int((load_E == 0).sum()),
    }


def router_summary(counts: dict[int, Floats]) -> dict[str, float | int]:
    """Return the layers' router metrics in one row; empty for a model without experts."""
    if not counts:
        return {}
    layers = [router_metrics(load_E) for load_E in counts.values()]
    violations = [layer["max_vio_global"] for layer in layers]
    return {
        "max_vio_global_mean": sum(violations) / len(layers),
        "max_vio_global_max": max(violations),
        "entropy_mean": sum(layer["entropy"] for layer in layers) / len(layers),
        "dead_experts": int(sum(layer["dead_experts"] for layer in layers)),
        "num_layers": len(layers),
    }

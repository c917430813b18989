"""How many tokens each expert of an exported model gets, counted by the model's own routers.

Letters: L layers, E n_routed_experts
"""

from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from dsv3.evaluation.load_balance import load_entropy, max_vio, num_dead_experts
from dsv3.export.interface import ExportedModel

Floats = npt.NDArray[np.float64]


class ExpertLoad:
    """Counts, per layer, how many tokens each routed expert gets while the `with` block runs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = cast(ExportedModel, model)
        self._routers = self._model.routers()
        self.counts: dict[int, Floats] = {}
        """Layer -> number of tokens per expert, of the layers that routed anything; filled when the block ends."""

    def __enter__(self) -> "ExpertLoad":
        self._model.set_count_expert_load(True)
        for _, router in self._routers:
            router.expert_load.zero_()
        return self

    def __exit__(self, *_: object) -> None:
        self._model.set_count_expert_load(False)
        loads = {layer: router.expert_load.double().cpu().numpy().copy() for layer, router in self._routers}
        self.counts = {layer: load_E for layer, load_E in loads.items() if load_E.any()}


def router_summary(counts: dict[int, Floats]) -> dict[str, float | int]:
    """Return how evenly the experts were used, means over layers and the worst; empty for a model without experts."""
    if not counts:
        return {}
    load_LE = torch.from_numpy(np.stack(list(counts.values())))
    max_vio_L, entropy_L = max_vio(load_LE).tolist(), load_entropy(load_LE).tolist()
    return {
        "max_vio_global_mean": sum(max_vio_L) / len(max_vio_L),
        "max_vio_global_max": max(max_vio_L),
        "entropy_mean": sum(entropy_L) / len(entropy_L),
        "dead_experts": int(num_dead_experts(load_LE).sum()),
        "num_layers": len(counts),
    }

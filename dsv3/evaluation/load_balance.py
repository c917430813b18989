"""How evenly the tokens of a layer are spread over its experts: the definitions, for training and evaluation.

Letters: L layers, E n_routed_experts
"""

import torch
from torch import Tensor


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


def num_dead_experts(load_LE: Tensor) -> Tensor:
    """Return how many experts of each layer got no token."""
    return (load_LE == 0).sum(dim=1)

"""Experts that lie on other processes: rows go to their experts, and what the experts give comes back.

With expert parallelism over N processes each holds E / N whole experts of every layer. A token's hidden state is sent
to the processes of the experts that its router chose, one row per choice, and each returns the expert's weighted
output; the token's own process adds up its choices. The alternative, to gather the experts' weights where the tokens
are (`runtime.sharding` alone), moves all weights of a layer instead of K rows per token.

How many rows go where is data: the processes exchange the numbers first, and wait once per layer and pass for the
device.

Letters: T tokens, K num_experts_per_tok, A assignments, R rows, E n_routed_experts, D hidden_size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from dsv3.kernels.permute import inverse_permutation


def dispatch_and_combine(
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    num_experts: int,
    group: Any,
) -> Tensor:
    """Send rows to the processes of `group` that hold their experts; return the experts' output (T, D).

    `experts` computes this process's experts, numbered from zero, on rows with one choice each. `num_experts` is the
    number of all experts. A collective: all processes of the group call it.
    """
    num_processes, num_choices = dist.get_world_size(group), index_TK.shape[1]
    own_experts = num_experts // num_processes
    assignment_A = torch.argsort(index_TK.reshape(-1), stable=True)  # by expert, so by process
    sent_E = torch.bincount(index_TK.reshape(-1), minlength=num_experts)
    received_E = torch.empty_like(sent_E)  # from each process, the rows for each of this one's experts
    dist.all_to_all_single(received_E, sent_E, group=group)
    sent, received = (counts.view(num_processes, own_experts).sum(1).tolist() for counts in (sent_E, received_E))

    def send(rows: Tensor) -> Tensor:
        return all_to_all_single_autograd(rows.contiguous(), received, sent, group)

    hidden_RD, weight_R1 = send(hidden_TD[assignment_A // num_choices]), send(weight_TK.reshape(-1, 1)[assignment_A])
    own_E = torch.arange(own_experts, device=index_TK.device).repeat(num_processes)
    index_R1 = own_E.repeat_interleave(received_E, output_size=sum(received))[:, None]
    output_RD = experts(hidden_RD, index_R1, weight_R1)
    output_AD = all_to_all_single_autograd(output_RD.contiguous(), sent, received, group)
    return output_AD[inverse_permutation(assignment_A).view(-1, num_choices)].sum(1)


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """Return `x`."""
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient times the scale."""
        return gradients[0] * ctx.scale, None


def own_weight(weight: Any, group: Any) -> Tensor:
    """Return this process's experts of a stack (E, ..); its gradient is a mean over the processes, as the loss is."""
    own: Tensor = ScaledGradient.apply(weight.to_local(), 1 / dist.get_world_size(group))
    return own

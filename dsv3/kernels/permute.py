"""Which rows belong to which expert.

Every fast expert computation sorts the assignments, pairs of a token and one of its experts, by expert once, so that
an expert's rows are one contiguous slice, and adds the results back per token. The sort is stable: an expert sees its
tokens in their order, and the sum over a token's choices always runs in the same order, which makes every backend
deterministic.

Letters: T tokens, K num_experts_per_tok, A assignments, E n_routed_experts, D hidden_size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ExpertOrder(NamedTuple):
    """The assignments sorted by expert."""

    assignment_A: Tensor
    """Assignment (t * K + k) at each sorted position."""
    position_TK: Tensor
    """Sorted position of each assignment, the inverse of `assignment_A`."""
    token_A: Tensor
    """Token at each sorted position."""
    end_E: Tensor
    """Row after each expert's last one, int32, which is what grouped GEMMs take."""


def expert_order(index_TK: Tensor, num_experts: int) -> ExpertOrder:
    """Return the assignments of `index_TK` (chosen experts) sorted by expert; never waits for the device."""
    expert_A, assignment_A = torch.sort(index_TK.reshape(-1), stable=True)
    expert_E = torch.arange(num_experts, device=index_TK.device)
    end_E = torch.searchsorted(expert_A, expert_E, right=True, out_int32=True)
    return with_inverse(assignment_A, end_E, index_TK.shape[1])


def with_inverse(assignment_A: Tensor, end_E: Tensor, num_experts_per_tok: int) -> ExpertOrder:
    """Return the whole order from its two defining tensors (the ones worth saving for the backward pass)."""
    position_TK = inverse_permutation(assignment_A).view(-1, num_experts_per_tok)
    return ExpertOrder(assignment_A, position_TK, assignment_A // num_experts_per_tok, end_E)


def inverse_permutation(assignment_A: Tensor) -> Tensor:
    """Return the sorted position of each assignment, from the assignment at each sorted position."""
    position_A = torch.empty_like(assignment_A)
    position_A[assignment_A] = torch.arange(assignment_A.numel(), device=assignment_A.device)
    return position_A


ExpertRows = list[tuple[int, slice]]
"""Experts that follow one another, each with its rows, counted from the first row of the first of them."""


def expert_groups(end_E: Tensor, min_rows: int) -> Iterator[tuple[slice, ExpertRows]]:
    """Yield groups of successive experts: their rows, and each expert's within them.

    A group is as few experts as have `min_rows` together; the last one may have less. Experts without rows are left
    out.
    """
    first = start = 0
    parts: ExpertRows = []
    for expert, end in enumerate(end_E.tolist()):
        if end > start:
            parts.append((expert, slice(start - first, end - first)))
        start = end
        if parts and end - first >= min_rows:
            yield slice(first, end), parts
            first, parts = end, []
    if parts:
        yield slice(first, start), parts


def sum_per_token(rows_AD: Tensor, position_TK: Tensor) -> Tensor:
    """Return for each token the sum of its K rows, shape (T, D): the inverse of gathering rows by token."""
    if rows_AD.is_cuda:  # embedding_bag's backward pass on CUDA sorts the indices once more
        return rows_AD[position_TK].sum(1)
    return F.embedding_bag(position_TK, rows_AD, mode="sum")

"""Which rows belong to which expert.

Every fast expert computation sorts the (token, choice) pairs by expert once, so that an expert's rows are one
contiguous slice, and adds the results back per token. The sort is stable: an expert sees its tokens in their order,
and the sum over a token's choices always runs in the same order, which makes every backend deterministic.

Letters: T tokens, K experts per token, S = T * K pairs, E experts, H hidden size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ExpertOrder(NamedTuple):
    """The pairs sorted by expert."""

    pair_S: Tensor
    """Pair (t * K + k) at each sorted position."""
    position_TK: Tensor
    """Sorted position of each pair, the inverse of `pair_S`."""
    token_S: Tensor
    """Token at each sorted position."""
    end_E: Tensor
    """Row after each expert's last one, int32, which is what grouped GEMMs take."""


def expert_order(index_TK: Tensor, num_experts: int) -> ExpertOrder:
    """Return the pairs of `index_TK` (chosen experts) sorted by expert; never waits for the device."""
    expert_S, pair_S = torch.sort(index_TK.reshape(-1), stable=True)
    expert_E = torch.arange(num_experts, device=index_TK.device)
    end_E = torch.searchsorted(expert_S, expert_E, right=True, out_int32=True)
    return with_inverse(pair_S, end_E, index_TK.shape[1])


def with_inverse(pair_S: Tensor, end_E: Tensor, num_experts_per_tok: int) -> ExpertOrder:
    """Return the whole order from its two defining tensors (the ones worth saving for the backward pass)."""
    position_S = torch.empty_like(pair_S)
    position_S[pair_S] = torch.arange(pair_S.numel(), device=pair_S.device)
    return ExpertOrder(pair_S, position_S.view(-1, num_experts_per_tok), pair_S // num_experts_per_tok, end_E)


Parts = list[tuple[int, slice]]
"""Experts that follow one another, each with its rows, counted from the first row of the first of them."""


def neighbours(end_E: Tensor, num_rows: int) -> Iterator[tuple[slice, Parts]]:
    """Yield the experts that have rows, at a time as few as have `num_rows` or more together, with the rows of all."""
    first = start = 0
    parts: Parts = []
    for expert, end in enumerate(end_E.tolist()):
        if end > start:
            parts.append((expert, slice(start - first, end - first)))
        start = end
        if parts and end - first >= num_rows:
            yield slice(first, end), parts
            first, parts = end, []
    if parts:
        yield slice(first, start), parts


def sum_per_token(rows_SH: Tensor, position_TK: Tensor) -> Tensor:
    """Return for each token the sum of its K rows, shape (T, H): the inverse of gathering rows by token."""
    if rows_SH.is_cuda:  # embedding_bag's backward pass on CUDA sorts the indices once more
        return rows_SH[position_TK].sum(1)
    return F.embedding_bag(position_TK, rows_SH, mode="sum")

"""When a CPU attends by the project's own kernel, and what it keeps; training and its estimate share this."""

from collections.abc import Iterator

BLOCK_QUERIES = {"fp32": 64, "bf16": 128}
"""Queries whose scores are computed together: fewer multiply less that is masked, in more and smaller products."""


def is_attention_blocked(
    qk_head_dim: int, v_head_dim: int, attention_dropout: float, cross_document_attention: bool
) -> bool:
    """Return whether a training on a CPU attends by `dsv3.kernels.cpu_attention`.

    torch has a fused kernel for values as wide as queries; masks between documents and dropout are left to torch.
    """
    return cross_document_attention and attention_dropout == 0 and qk_head_dim != v_head_dim


def blocks(num_positions: int, precision: str) -> Iterator[tuple[slice, int]]:
    """Yield each block's queries, and where its weights begin among those that a head keeps."""
    size, at = BLOCK_QUERIES[precision], 0
    for start in range(0, num_positions, size):
        rows = slice(start, min(start + size, num_positions))
        yield rows, at
        at += (rows.stop - rows.start) * rows.stop


def num_kept_weights(num_positions: int, precision: str) -> int:
    """Return how many weights a head keeps of the S² of a square: those of keys up to the end of each block."""
    return sum((rows.stop - rows.start) * rows.stop for rows, _ in blocks(num_positions, precision))

"""The validation loss during training: quick, deterministic, over the whole split.

The split is cut into blocks of `block_size` tokens that do not overlap, the last one shorter, so every token but the
first is predicted once. The first tokens of a block lack context, so this is a little higher than what `evaluate`
reports of the exported model.

Letters: B sequences, S positions
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv3.data.shards import TokenStream
from mini_model.modeling_deepseek import DeepseekV3CausalLMOutput


@dataclass(frozen=True)
class BlockBatch:
    """Consecutive blocks of a split that are computed together."""

    start: int
    """First input token."""

    num_blocks: int
    length: int
    """Predicted tokens per block."""


def block_batches(num_tokens: int, block_size: int, batch_size: int) -> list[BlockBatch]:
    """Return the batches of a split of `num_tokens`; a shorter last block is a batch of its own."""
    num_full, rest = divmod(num_tokens - 1, block_size)
    batches = [
        BlockBatch(first * block_size, min(batch_size, num_full - first), block_size)
        for first in range(0, num_full, batch_size)
    ]
    return [*batches, BlockBatch(num_full * block_size, 1, rest)] if rest else batches


def read_blocks(stream: TokenStream, batch: BlockBatch) -> Tensor:
    """Return the tokens of a batch as int64 (B, S + 1); each block ends with the first token of the next."""
    flat = stream[batch.start : batch.start + batch.num_blocks * batch.length + 1].astype(np.int64)
    index = np.arange(batch.num_blocks)[:, None] * batch.length + np.arange(batch.length + 1)[None, :]
    return torch.from_numpy(flat[index])


@torch.no_grad()
def summed_loss(
    model: Callable[..., DeepseekV3CausalLMOutput],
    stream: TokenStream,
    batches: Sequence[BlockBatch],
    device: torch.device,
    position_ids: Callable[[Tensor], Tensor | None] = lambda _: None,
) -> float:
    """Return the summed cross-entropy in nats of all targets of `batches`, by a model in evaluation mode.

    `position_ids` returns the position ids of tokens (B, S), or None to count from the beginning of each block.
    """
    nats = 0.0
    for batch in batches:
        tokens = read_blocks(stream, batch).to(device)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        # One position's logits and no cache: the loss needs neither.
        options = {"position_ids": position_ids(inputs), "logits_to_keep": 1, "use_cache": False}
        output = model(input_ids=inputs, shift_labels=targets, **options)
        assert output.cross_entropy_loss is not None, "targets were given"
        nats += output.cross_entropy_loss.item() * batch.num_blocks * batch.length
    return nats

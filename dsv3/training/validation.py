"""The validation loss during training: quick, deterministic, over the whole split.

The split is cut into windows of `block_size` tokens that do not overlap, the last one shorter, so every token but the
first is predicted once. Windows' first tokens lack context, so this is a little higher than what `evaluate` reports of
the exported model.

Letters: B windows in a batch, S positions in a window.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dsv3.data.shards import TokenStream
from mini_model.modeling_deepseek import DeepseekV3CausalLMOutput


def windows(num_tokens: int, block_size: int, batch_size: int) -> list[tuple[int, int, int]]:
    """Return (start, number of windows, predicted tokens per window) of each batch, the shorter last window apart."""
    num_full, rest = divmod(num_tokens - 1, block_size)
    batches = [
        (first * block_size, min(batch_size, num_full - first), block_size) for first in range(0, num_full, batch_size)
    ]
    return [*batches, (num_full * block_size, 1, rest)] if rest else batches


def tokens_of(stream: TokenStream, start: int, num_windows: int, length: int) -> Tensor:
    """Return consecutive windows as int64 (B, S + 1); each ends with the first token of the next."""
    flat = stream[start : start + num_windows * length + 1].astype(np.int64)
    index_BS = np.arange(num_windows)[:, None] * length + np.arange(length + 1)[None, :]
    return torch.from_numpy(flat[index_BS])


@torch.no_grad()
def summed_loss(
    model: Callable[..., DeepseekV3CausalLMOutput],
    stream: TokenStream,
    batches: list[tuple[int, int, int]],
    device: torch.device,
    position_ids: Callable[[Tensor], Tensor | None] = lambda _: None,
) -> float:
    """Return the summed cross-entropy in nats of all tokens that `batches` predict, by a model in evaluation mode.

    `position_ids` gives the positions of tokens (B, S), or None to count them from the beginning of each window.
    """
    nats = 0.0
    for start, num_windows, length in batches:
        tokens = tokens_of(stream, start, num_windows, length).to(device)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        # One logit kept and no cache: no more is computed than the loss needs.
        options = {"position_ids": position_ids(inputs), "logits_to_keep": 1, "use_cache": False}
        output = model(input_ids=inputs, shift_labels=targets, **options)
        assert output.cross_entropy_loss is not None, "targets were given"
        nats += output.cross_entropy_loss.item() * num_windows * length
    return nats

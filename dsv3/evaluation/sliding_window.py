"""The score of a whole split, by a sliding window.

A model sees at most `block_size` tokens at once. If a text were cut into separate blocks, the first tokens of each
block would be predicted almost without context, and the score would depend on the cutting. Here the window moves by
`stride` tokens. Of every window but the first, only those last tokens are scored that no earlier window has scored. So
each token counts once, and has at least `block_size - stride` tokens before it (or all there are). A smaller stride
gives every token more context and costs more: the text is computed block_size / stride times. The last window is moved
back to the end of the text rather than padded, so no padding is computed, scored or routed. Where documents do not
attend to one another, a token has at least that many tokens before it or all of its document, and the first word of a
document is predicted from the end-of-text token alone.

Nats per token depend on the tokenizer. Nats per character and bits per byte do not: compare runs by these.

Letters: B sequences, S positions, V vocab_size, E n_routed_experts
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dsv3.data.batches import document_positions
from dsv3.errors import UserError
from dsv3.evaluation.expert_load import ExpertLoad, router_summary
from dsv3.evaluation.mtp_acceptance import MTPAcceptance
from dsv3.params.evaluate import EvaluateParams
from dsv3.scores import SplitScore

Floats = npt.NDArray[np.float64]
PositionIds = Callable[[Tensor], Tensor | None]
"""From tokens (B, S) to their position ids, or to None, which counts from each window's beginning."""
SPLITS = ("validation", "test")


class TokenSequence(Protocol):
    """Tokens in memory or on disk: `len(tokens)`, `tokens[start:stop]`."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> npt.NDArray[np.unsignedinteger]: ...


@dataclass(frozen=True)
class SlidingWindow:
    """Inputs `start` to `start + length`; the last `num_scored` of their targets are scored."""

    start: int
    length: int
    num_scored: int


@dataclass
class PositionLoss:
    """Sum of losses and number of windows at each position of the window, scored or not."""

    nats_S: Floats
    count_S: npt.NDArray[np.int64]

    @classmethod
    def zeros(cls, block_size: int) -> "PositionLoss":
        """Return an empty table."""
        return cls(np.zeros(block_size), np.zeros(block_size, dtype=np.int64))

    def add(self, loss_BS: Floats) -> None:
        """Add a batch of windows."""
        num_windows, length = loss_BS.shape
        self.nats_S[:length] += loss_BS.sum(axis=0)
        self.count_S[:length] += num_windows

    def means(self) -> Floats:
        """Return the mean loss of each position that any window reached."""
        is_reached_S = self.count_S > 0
        return self.nats_S[is_reached_S] / self.count_S[is_reached_S]


def sliding_windows(num_tokens: int, block_size: int, stride: int) -> Iterator[SlidingWindow]:
    """Yield windows that score each of tokens 1 … num_tokens - 1 once; token 0 has no context."""
    num_targets = num_tokens - 1
    if num_targets <= 0:
        return
    end = min(block_size, num_targets)
    yield SlidingWindow(0, end, end)
    while end < num_targets:
        scored = min(stride, num_targets - end)
        end += scored
        yield SlidingWindow(end - block_size, block_size, scored)


@torch.inference_mode()
def score_split(  # noqa: PLR0913 (the last three have defaults)
    model: PreTrainedModel,
    tokens: TokenSequence,
    params: EvaluateParams,
    positions: PositionLoss,
    progress: Callable[[int], object] = lambda num_scored: None,
    acceptance: MTPAcceptance | None = None,
    position_ids: PositionIds = lambda _: None,
) -> float:
    """Return the sum of nats over tokens 1 … end of a split; add every window's losses to `positions`.

    With `acceptance`, for a model with MTP modules, their predictions of the same tokens are added to it. `progress` is
    called with the number of tokens scored by each batch. Sums are in float64 on the CPU, in a fixed order.
    """
    nats = 0.0
    windows = list(sliding_windows(len(tokens), params.block_size, params.stride))
    for first in range(0, len(windows), params.per_device_eval_batch_size):
        batch = windows[first : first + params.per_device_eval_batch_size]
        loss_BS = window_losses(model, tokens, batch, acceptance, position_ids)
        positions.add(loss_BS)
        nats += sum(float(loss_S[-w.num_scored :].sum()) for w, loss_S in zip(batch, loss_BS, strict=True))
        progress(sum(w.num_scored for w in batch))
    return nats


def window_losses(
    model: PreTrainedModel,
    tokens: TokenSequence,
    batch: Sequence[SlidingWindow],
    acceptance: MTPAcceptance | None,
    position_ids: PositionIds,
) -> Floats:
    """Return the cross-entropy in nats, (B, S), of every target of a batch of equally long windows."""
    rows = [tokens[w.start : w.start + w.length + 1].astype(np.int64) for w in batch]
    ids = torch.from_numpy(np.stack(rows)).to(model.device)
    positions_BS = position_ids(ids[:, :-1])
    logits_BSV: Tensor
    if acceptance is None:
        logits_BSV = model(input_ids=ids[:, :-1], position_ids=positions_BS, use_cache=False).logits
    else:
        logits_BSV = acceptance.update(ids, [w.num_scored for w in batch], positions_BS)
    loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return loss.view(len(batch), -1).double().cpu().numpy()


@dataclass(frozen=True)
class Evaluation:
    """The results of `evaluate`."""

    scores: dict[str, SplitScore]
    """Split -> its sums; `heldout` is validation and test together."""

    positions: PositionLoss
    loads: dict[int, Floats]
    """Layer -> number of tokens per expert, MTP modules included."""
    acceptance: MTPAcceptance | None = None
    """Over all splits; None for a model without MTP modules."""

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Return the content of results/evaluate/metrics.json."""
        splits = {name: score.metrics() for name, score in self.scores.items()}
        mtp = {} if self.acceptance is None else {"mtp": self.acceptance.metrics()}
        return {**splits, "router": router_summary(self.loads), **mtp}

    def position_table(self) -> str:
        """Return the loss by position as tab-separated text."""
        rows = enumerate(zip(self.positions.means(), self.positions.count_S, strict=False))
        return "position\tloss\ttokens\n" + "".join(f"{at}\t{loss:.9g}\t{count}\n" for at, (loss, count) in rows)

    def load_table(self) -> str:
        """Return each expert's share of its layer's tokens as tab-separated text."""
        lines = ["layer\texpert\tload_share\n"]
        for layer, load_E in self.loads.items():
            lines += [f"{layer}\t{expert}\t{share:.9g}\n" for expert, share in enumerate(load_E / load_E.sum())]
        return "".join(lines)


def positions_of(params: EvaluateParams, bos_token_id: int) -> PositionIds:
    """Return what gives a window's positions: restarting with each document where they are not to see each other."""
    if params.cross_document_attention:
        return lambda _: None
    return partial(document_positions, bos_token_id=bos_token_id)


def evaluate(
    model: PreTrainedModel,
    streams: Mapping[str, TokenSequence],
    meta: Mapping[str, Any],
    params: EvaluateParams,
    progress: Callable[[int], object] = lambda num_scored: None,
) -> Evaluation:
    """Return the scores of each split in `streams` and of all together; `meta` is the tokens' meta.json."""
    positions = PositionLoss.zeros(params.block_size)
    scores: dict[str, SplitScore] = {}
    acceptance = MTPAcceptance(model) if model.config.num_nextn_predict_layers else None
    position_ids = positions_of(params, meta["bos_token_id"])
    with ExpertLoad(model) as load:
        for split, stream in streams.items():
            nats = score_split(model, stream, params, positions, progress, acceptance, position_ids)
            size = meta["splits"][split]
            scores[split] = SplitScore(nats, len(stream) - 1, size["characters"], size["bytes"])
    first, *others = scores.values()
    return Evaluation(scores | {"heldout": sum(others, start=first)}, positions, load.counts, acceptance)


def check_fits(model: PreTrainedModel, meta: Mapping[str, Any], params: EvaluateParams) -> None:
    """Raise `UserError` where the tokens (`meta`: their meta.json) or the window don't fit the exported model."""
    config = model.config
    if meta["vocab_size"] > config.vocab_size:
        raise UserError(
            f"data/tokens has a vocabulary of {meta['vocab_size']}; must be <= {config.vocab_size}, the exported "
            "model's; run dvc repro"
        )
    if params.block_size > config.max_position_embeddings:
        raise UserError(
            f"params.yaml: evaluate.block_size is {params.block_size}; must be <= {config.max_position_embeddings}, "
            "the exported model's max_position_embeddings"
        )
    for split in SPLITS:
        if meta["splits"][split]["tokens"] < 2:
            raise UserError(f"data/tokens: {split} has no tokens; raise tokenize.{split}_fraction")

"""How often the prediction modules foresee the trunk, on text that is given.

In decoding, a draft is kept if the trunk would have written the same, and if all drafts before it were kept. Here every
token is given instead of written, which needs no decoding and depends on no prompt. At each position the modules guess
the tokens to come, module k told the k true tokens next in line; its guess is accepted where modules 1 … k all say what
the trunk, given all true tokens before, finds most probable. Greedy decoding writes about 1 + (sum of the shares)
tokens per forward pass, as far as written text is like given text.

Letters: B windows in a batch, T positions in a window, D hidden_size, V vocab_size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


class Trunk(Protocol):
    """What the exported code offers beyond transformers' interface."""

    def embed_tokens(self, ids: Tensor, /) -> Tensor:
        """Return the tokens' embeddings."""
        ...

    def predictions_ahead(self, hidden: Tensor, embeds: Tensor, /, *, position_ids: Tensor | None) -> Iterator[Tensor]:
        """Yield, for module k = 1, 2 …, the states from which the token k + 1 places on is read, k positions fewer."""
        ...

    def __call__(self, input_ids: Tensor, *, position_ids: Tensor | None, use_cache: bool) -> Any:
        """Return an object with the normalised `last_hidden_state` of every position."""
        ...


class Acceptance:
    """Sums over scored tokens, an entry per prediction module."""

    def __init__(self, model: PreTrainedModel) -> None:
        num_modules = model.config.num_nextn_predict_layers
        self._trunk = cast(Trunk, model.model)
        self._head = cast(Callable[[Tensor], Tensor], model.lm_head)
        self.accepted = [0] * num_modules
        self.nats = [0.0] * num_modules
        self.tokens = [0] * num_modules

    def logits(self, ids: Tensor, num_scored: Sequence[int], position_ids: Tensor | None = None) -> Tensor:
        """Return the model's own logits for all but the last of `ids`, (B, T, V), and count what the modules say.

        Each row of `ids` is a window with its last target, (B, T + 1), whose last `num_scored` targets count. A guess
        is filed under the token that it is about, so each token counts once per module (but for the first tokens of a
        text, which the deeper modules have no position to guess from). `position_ids` (B, T) restart where another
        document begins that is not to see the one before; the modules were not trained to look across, and no guess
        counts that would.
        """
        input_BT = ids[:, :-1]
        hidden_BTD = self._trunk(input_BT, position_ids=position_ids, use_cache=False).last_hidden_state
        logits_BTV = self._head(hidden_BTD)
        choice_BT = logits_BTV.argmax(dim=-1)
        length = input_BT.shape[1]
        unscored_B1 = length - torch.tensor(num_scored, device=ids.device)[:, None]
        is_scored_BT = torch.arange(length, device=ids.device) >= unscored_B1
        is_accepted_BT = torch.ones_like(is_scored_BT)
        embeds_BTD = self._trunk.embed_tokens(input_BT)
        ahead = self._trunk.predictions_ahead(hidden_BTD, embeds_BTD, position_ids=position_ids)
        for depth, state_BTD in zip(range(1, length), ahead, strict=False):
            guess_BTV = self._head(state_BTD)
            is_accepted_BT = is_accepted_BT[:, :-1] & (guess_BTV.argmax(dim=-1) == choice_BT[:, depth:])
            loss = F.cross_entropy(guess_BTV.flatten(0, 1).float(), ids[:, depth + 1 :].flatten(), reduction="none")
            counts_BT = is_scored_BT[:, depth:]
            if position_ids is not None:
                counts_BT = counts_BT & (position_ids[:, depth:] - position_ids[:, :-depth] == depth)
            self.accepted[depth - 1] += int((is_accepted_BT & counts_BT).sum())
            self.nats[depth - 1] += float(loss.view_as(counts_BT)[counts_BT].double().sum())
            self.tokens[depth - 1] += int(counts_BT.sum())
        return logits_BTV

    def metrics(self) -> dict[str, dict[str, float | int]]:
        """Return shares, cross-entropies and counts of `depth_1`, `depth_2` …, under the vocabulary's names."""
        rows = enumerate(zip(self.accepted, self.nats, self.tokens, strict=True), start=1)
        return {
            f"depth_{depth}": {"mtp_acceptance": accepted / tokens, "nats_per_token": nats / tokens, "tokens": tokens}
            for depth, (accepted, nats, tokens) in rows
            if tokens
        }

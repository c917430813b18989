"""How often the drafts of the multi-token prediction (MTP) modules would be accepted, on text that is given.

In decoding, a draft is accepted if the trunk would have chosen the same token, and if all drafts before it were
accepted. Here every token is given instead of generated, which needs no decoding and depends on no prompt. At each
position module k predicts a token from the k true tokens after that position. Its prediction is accepted where modules
1 … k all name the token that the trunk, given all true tokens before, finds most probable. Greedy decoding generates
about 1 + (sum of the acceptance rates) tokens per forward pass, as far as generated text is like given text.

Letters: B sequences, S positions, D hidden_size, V vocab_size
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dsv3.export.interface import ExportedModel


class MTPAcceptance:
    """Sums over scored tokens, an entry per MTP module."""

    def __init__(self, model: PreTrainedModel) -> None:
        num_modules = model.config.num_nextn_predict_layers
        self._model = cast(ExportedModel, model)
        self.accepted = [0] * num_modules
        self.nats = [0.0] * num_modules
        self.tokens = [0] * num_modules

    def update(self, ids: Tensor, num_scored: Sequence[int], position_ids: Tensor | None = None) -> Tensor:
        """Add the predictions of every module; return the model's own logits for all but the last of `ids`, (B, S, V).

        Each row of `ids`, (B, S + 1), is a window with its last target; its last `num_scored` targets are scored. A
        prediction belongs to the token it predicts, so each token counts once per module, except for the first tokens
        of a text, for which the deeper modules have no position to predict from. `position_ids` (B, S) restart where a
        document begins that does not attend to the one before. The modules were not trained to predict across such a
        boundary, and a prediction that would does not count.
        """
        trunk, head = self._model.model, self._model.lm_head
        input_BS = ids[:, :-1]
        hidden_BSD = trunk(input_BS, position_ids=position_ids, use_cache=False).last_hidden_state
        logits_BSV = head(hidden_BSD)
        choice_BS = logits_BSV.argmax(dim=-1)
        length = input_BS.shape[1]
        num_unscored_B1 = length - torch.tensor(num_scored, device=ids.device)[:, None]
        is_scored_BS = torch.arange(length, device=ids.device) >= num_unscored_B1
        is_accepted_BS = torch.ones_like(is_scored_BS)
        states = trunk.mtp_hidden_states(hidden_BSD, trunk.embed_tokens(input_BS), position_ids=position_ids)
        for depth, state_BSD in zip(range(1, length), states, strict=False):
            draft_BSV = head(state_BSD)
            is_accepted_BS = is_accepted_BS[:, :-1] & (draft_BSV.argmax(dim=-1) == choice_BS[:, depth:])
            loss = F.cross_entropy(draft_BSV.flatten(0, 1).float(), ids[:, depth + 1 :].flatten(), reduction="none")
            counts_BS = is_scored_BS[:, depth:]
            if position_ids is not None:
                counts_BS = counts_BS & (position_ids[:, depth:] - position_ids[:, :-depth] == depth)
            self.accepted[depth - 1] += int((is_accepted_BS & counts_BS).sum())
            self.nats[depth - 1] += float(loss.view_as(counts_BS)[counts_BS].double().sum())
            self.tokens[depth - 1] += int(counts_BS.sum())
        return logits_BSV

    def metrics(self) -> dict[str, dict[str, float | int]]:
        """Return rates, cross-entropies and counts of `depth_1`, `depth_2` …, under the names of the metrics table."""
        rows = enumerate(zip(self.accepted, self.nats, self.tokens, strict=True), start=1)
        return {
            f"depth_{depth}": {"mtp_acceptance": accepted / tokens, "nats_per_token": nats / tokens, "tokens": tokens}
            for depth, (accepted, nats, tokens) in rows
            if tokens
        }

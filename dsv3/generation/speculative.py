"""Speculative decoding: the model's own prediction modules guess some tokens, and the trunk judges them all at once.

To write one token, a model reads all its weights; to judge a few, it reads them once too. So whoever can guess cheaply
writes faster, and the prediction modules (technical report, §2.2 and §5.4.3) were trained to guess. A round:

1. *Draft.* Of n tokens, the trunk has the states of n - 1. Module 1 joins each with the embedding of the token after
   it, and reads off the last one a guess at token n; module 2 joins what module 1 computed with the tokens one further
   on, that guess among them, and guesses token n + 1; and so on. The modules keep latents of their own.
2. *Judge.* The trunk reads the last token and the drafts in one pass: a few queries on the latent cache, which the
   absorbed form answers. That gives its own distribution after each of them.
3. *Keep.* A draft d, drawn from q where the trunk would draw from p, is kept with probability min(1, p(d) / q(d)). The
   first that is not is replaced by a draw from max(0, p - q), and ends the round; where all are kept, p gives one token
   more. So what is written is distributed as if the trunk had drawn every token (Leviathan et al., arXiv:2211.17192,
   algorithm 1). Taking the most probable token is the case where p and q have one outcome each: a draft is kept if it
   is the trunk's choice, and the text is the same, token for token. (Passes of another length round differently, so
   tokens that tie within rounding may change places: hardly ever in fp32, now and then in bf16.)
4. *Forget.* The caches lose what rested on drafts that were not kept.

transformers has such a loop, `generate(use_mtp=True)`, which is the oracle of our tests. It is not used, for in 5.23
it reads the modules from disk into a second copy for every text, fails for prompts shorter than the number
of modules, refuses several continuations, and does not say how many drafts were kept.

Letters: B sequences (one), S positions, V vocab_size, D hidden_size; J drafts (one per prediction module), I = J + 1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dsv3.errors import UserError
from dsv3.params.sample import SampleParams

Distribution = Callable[[Tensor], Tensor]
"""From logits (S, V) to the probabilities, (S, V), with which tokens are drawn."""


class Trunk(Protocol):
    """What the exported code offers beyond transformers' interface."""

    @property
    def layers(self) -> Sequence[Callable[..., Tensor]]:
        """Return the trunk's layers, and the prediction modules after them."""
        ...

    def embed_tokens(self, ids: Tensor, /) -> Tensor:
        """Return the tokens' embeddings."""
        ...

    def attention_context(
        self, embeds: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: DynamicCache
    ) -> dict[str, Any]:
        """Return what a layer must know of the positions."""
        ...

    def __call__(self, input_ids: Tensor, *, past_key_values: DynamicCache, use_cache: bool) -> Any:
        """Return an object with the normalised `last_hidden_state` of every position."""
        ...


@dataclass(frozen=True)
class DraftCounts:
    """How the drafts fared; adds up over texts."""

    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    """Written, an end of text included."""
    passes: int = 0
    """Forward passes of the trunk, that over the prompt included; without drafts there is one per token."""

    def __add__(self, other: "DraftCounts") -> "DraftCounts":
        return DraftCounts(
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            self.tokens + other.tokens,
            self.passes + other.passes,
        )

    def metrics(self) -> dict[str, float]:
        """Return the ratios under the vocabulary's names; no acceptance where nothing was drafted."""
        acceptance = {"draft_acceptance": self.accepted / self.drafted} if self.drafted else {}
        return {**acceptance, "tokens_per_pass": self.tokens / self.passes}

    def __str__(self) -> str:
        share = f" ({self.accepted / self.drafted:.1%})" if self.drafted else ""
        return (
            f"{self.accepted:,} of {self.drafted:,} drafts accepted{share}, "
            f"{self.tokens / self.passes:.2f} tokens per forward pass"
        )


def check_predicts_ahead(model: PreTrainedModel) -> None:
    """Raise `UserError` where the model has no prediction modules to draft with."""
    if not model.config.num_nextn_predict_layers:
        raise UserError(
            "params.yaml: sample.speculative is true; needs a model with prediction modules, and the exported one's "
            "num_nextn_predict_layers is 0; train one that has, or set sample.speculative to false"
        )


@torch.inference_mode()
def speculated(
    model: PreTrainedModel, prompt: Sequence[int], params: SampleParams, end_of_text: int
) -> tuple[list[int], DraftCounts]:
    """Return the tokens that follow `prompt`, up to an end of text or `params.max_new_tokens`, and how drafts fared.

    Draws from torch's global generator. `model` must have prediction modules (`check_predicts_ahead`).
    """
    trunk, head = cast(Trunk, model.model), cast(Callable[[Tensor], Tensor], model.lm_head)
    distribution = distribution_of(params)
    drafter, cache = Drafter(model, distribution), DynamicCache()
    ids_BS = torch.tensor([prompt], device=model.device)
    written: list[int] = []
    counts = DraftCounts()
    while len(written) < params.max_new_tokens and written[-1:] != [end_of_text]:
        # the trunk adds a token to the drafts it keeps, so one draft fewer than there is room for
        draft_J, q_JV = drafter.drafts(ids_BS, most=params.max_new_tokens - len(written) - 1)
        unread_BS = torch.cat([ids_BS, draft_J[None]], dim=1)[:, cache.get_seq_length() :]
        state_BSD = trunk(unread_BS, past_key_values=cache, use_cache=True).last_hidden_state
        p_IV = distribution(head(state_BSD[0, -1 - len(draft_J) :]))
        kept_S = kept_tokens(draft_J, q_JV, p_IV)
        num_rejected = len(draft_J) + 1 - len(kept_S)
        cache.crop(-num_rejected)
        drafter.learn(state_BSD[:, : state_BSD.shape[1] - num_rejected])
        ids_BS = torch.cat([ids_BS, kept_S[None]], dim=1)
        new = list(_until(kept_S.tolist(), end_of_text))
        written += new
        counts += DraftCounts(len(draft_J), min(len(new), len(kept_S) - 1), len(new), 1)
    return written, counts


def distribution_of(params: SampleParams) -> Distribution:
    """Return the function from logits to probabilities; where not `do_sample`, all of it on the most probable token."""
    if not params.do_sample:
        return lambda logits_SV: F.one_hot(logits_SV.argmax(dim=-1), logits_SV.shape[-1]).float()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    no_ids = torch.empty(0, dtype=torch.long)  # these three look at the logits alone
    return lambda logits_SV: warpers(cast(torch.LongTensor, no_ids), logits_SV.float()).softmax(dim=-1)


def kept_tokens(draft_J: Tensor, q_JV: Tensor, p_IV: Tensor) -> Tensor:
    """Return the drafts that are kept and the trunk's token after them, so at least one token."""
    num_drafts = len(draft_J)
    column_J1 = draft_J[:, None]
    chance_J = (p_IV[:num_drafts].gather(1, column_J1) / q_JV.gather(1, column_J1))[:, 0]
    num_kept = int((torch.rand_like(chance_J) < chance_J).cumprod(dim=0).sum())
    rest_V = p_IV[num_kept]
    if num_kept < num_drafts:
        rest_V = (rest_V - q_JV[num_kept]).clamp(min=0)
    if not rest_V.any():  # p and q differ by rounding only
        rest_V = p_IV[num_kept]
    return torch.cat([draft_J[:num_kept], torch.multinomial(rest_V, 1)])


def _until(tokens: Sequence[int], last: int) -> Iterator[int]:
    """Yield `tokens` up to and with the first that is `last`."""
    for token in tokens:
        yield token
        if token == last:
            return


class OneLayerCache(DynamicCache):
    """The latents of one prediction module, whose number within the whole model plays no part here."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append latents and rotated keys; return all of them."""
        return super().update(key_states, value_states, 0, *args, **kwargs)


class Drafter:
    """Guesses the next tokens with the prediction modules, whose caches it keeps."""

    def __init__(self, model: PreTrainedModel, distribution: Distribution) -> None:
        self._trunk = cast(Trunk, model.model)
        self._head = cast(Callable[[Tensor], Tensor], model.lm_head)
        self._distribution = distribution
        self._modules = list(self._trunk.layers)[model.config.num_hidden_layers :]
        self._caches = [OneLayerCache() for _ in self._modules]
        width, device = model.config.hidden_size, model.device
        self._state_BSD = torch.empty(1, 0, width, dtype=model.dtype, device=device)
        """The trunk's states of all tokens but the last."""
        self._no_drafts = (
            torch.empty(0, dtype=torch.long, device=device),
            torch.empty(0, model.config.vocab_size, device=device),
        )

    def learn(self, state_BSD: Tensor) -> None:
        """Append the trunk's states of further tokens."""
        self._state_BSD = torch.cat([self._state_BSD, state_BSD], dim=1)

    def drafts(self, ids_BS: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Return the tokens guessed to follow, `most` of them at most, and the distributions they were drawn from.

        None before the trunk has read anything. Draws from torch's global generator.
        """
        num_known = self._state_BSD.shape[1]
        draft_J, q_JV = self._no_drafts
        if num_known == 0:
            return draft_J, q_JV
        # Module k looks k tokens ahead of a position, so its last k - 1 latents rest on drafts. All modules go back
        # equally far, for each reads the states of the one before.
        start = self._caches[0].get_seq_length()
        state_BSD = self._state_BSD[:, start:]
        for depth, (module, cache) in enumerate(zip(self._modules[: max(0, most)], self._caches, strict=False), 1):
            later_BSD = self._trunk.embed_tokens(torch.cat([ids_BS, draft_J[None]], dim=1)[:, start + depth :])
            context = self._trunk.attention_context(later_BSD, None, None, cache)
            state_BSD = module(state_BSD, later_BSD, **context)
            q_JV = torch.cat([q_JV, self._distribution(self._head(state_BSD[:, -1]))])
            draft_J = torch.cat([draft_J, torch.multinomial(q_JV[-1], 1)])
            cache.crop(-min(len(self._modules) - 1, cache.get_seq_length()))
        return draft_J, q_JV

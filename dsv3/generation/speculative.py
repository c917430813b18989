"""Speculative decoding: the model's own multi-token prediction (MTP) modules draft tokens, the trunk verifies them.

To generate one token, a model reads all its weights; to verify a few, it reads them once too. So cheap drafts make
decoding faster, and the MTP modules (technical report, §2.2 and §5.4.3) were trained to predict those tokens. A round:

1. *Draft.* Of n tokens, the trunk has the states of n - 1. Module 1 merges each with the embedding of the token after
   it, and predicts token n from the last one; module 2 merges the states of module 1 with the embeddings of the tokens
   one further on, the first draft included, and predicts token n + 1; and so on. Each module has a latent cache.
2. *Verify.* The trunk reads the last token and the drafts in one pass: a few queries on the latent cache, for which the
   attention takes its absorbed form. This gives the trunk's own distribution after each of them.
3. *Accept.* A draft d, drawn from q where the trunk would draw from p, is accepted with probability
   min(1, p(d) / q(d)). The first that is rejected is replaced by a draw from max(0, p - q), and ends the round; if all
   are accepted, one more token is drawn from p. So the text is distributed as if the trunk had drawn every token
   (Leviathan et al., arXiv:2211.17192, algorithm 1). In greedy decoding p and q have one outcome each: a draft is
   accepted if it is the trunk's choice, and the text is the same, token for token. (Passes of another length round
   differently, so tokens that tie within rounding may be exchanged: rarely in fp32, sometimes in bf16.)
4. *Crop.* The caches drop the entries that depend on rejected drafts.

transformers has such a loop, `generate(use_mtp=True)`, against which the tests compare. It is not used here: in 5.23 it
loads the modules from disk into a second copy for every text, fails for prompts shorter than the number of modules,
refuses several continuations, and does not report how many drafts were accepted.

Letters: B sequences, S positions, V vocab_size, D hidden_size, J drafts
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

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
from dsv3.export.interface import ExportedModel
from dsv3.params.sample import SampleParams

Distribution = Callable[[Tensor], Tensor]
"""From logits (S, V) to the probabilities, (S, V), with which tokens are drawn."""


@dataclass(frozen=True)
class DraftCounts:
    """How many drafts were accepted; adds up over texts."""

    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    """Generated, an end of text included."""
    passes: int = 0
    """Forward passes of the trunk, the one over the prompt included; without drafts there is one per token."""

    def __add__(self, other: "DraftCounts") -> "DraftCounts":
        return DraftCounts(
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            self.tokens + other.tokens,
            self.passes + other.passes,
        )

    def metrics(self) -> dict[str, float]:
        """Return the ratios, under the names of the metrics table; no acceptance if nothing was drafted."""
        acceptance = {"draft_acceptance": self.accepted / self.drafted} if self.drafted else {}
        return {**acceptance, "tokens_per_pass": self.tokens / self.passes}

    def __str__(self) -> str:
        share = f" ({self.accepted / self.drafted:.1%})" if self.drafted else ""
        return (
            f"{self.accepted:,} of {self.drafted:,} drafts accepted{share}, "
            f"{self.tokens / self.passes:.2f} tokens per forward pass"
        )


def check_has_mtp_modules(model: PreTrainedModel) -> None:
    """Raise `UserError` if the model has no MTP modules to draft with."""
    if not model.config.num_nextn_predict_layers:
        raise UserError(
            "params.yaml: sample.speculative is true; needs a model with MTP modules, and the exported one's "
            "num_nextn_predict_layers is 0; train one that has, or set sample.speculative to false"
        )


@torch.inference_mode()
def generate_speculatively(
    model: PreTrainedModel,
    prompt: Sequence[int],
    params: SampleParams,
    end_of_text: int,
    tell: Callable[[list[int]], None] | None = None,
) -> tuple[list[int], DraftCounts]:
    """Return the tokens after `prompt`, up to an end of text or `params.max_new_tokens`, and the drafts' counts.

    Draws from torch's global generator; calls `tell` with the tokens of each round. `model` must have MTP modules
    (`check_has_mtp_modules`).
    """
    exported = cast(ExportedModel, model)
    distribution = distribution_of(params)
    drafter, cache = Drafter(model, distribution), DynamicCache()
    ids_BS = torch.tensor([prompt], device=model.device)
    generated: list[int] = []
    counts = DraftCounts()
    while len(generated) < params.max_new_tokens and generated[-1:] != [end_of_text]:
        # The trunk adds a token to the accepted drafts, so there is one draft fewer than tokens missing.
        draft_J, q_JV = drafter.draft(ids_BS, max_drafts=params.max_new_tokens - len(generated) - 1)
        unread_BS = torch.cat([ids_BS, draft_J[None]], dim=1)[:, cache.get_seq_length() :]
        state_BSD = exported.model(unread_BS, past_key_values=cache, use_cache=True).last_hidden_state
        p_SV = distribution(exported.lm_head(state_BSD[0, -1 - len(draft_J) :]))
        new_S = rejection_sample(draft_J, q_JV, p_SV)
        num_rejected = len(draft_J) + 1 - len(new_S)
        cache.crop(-num_rejected)
        drafter.append_states(state_BSD[:, : state_BSD.shape[1] - num_rejected])
        ids_BS = torch.cat([ids_BS, new_S[None]], dim=1)
        new = up_to(new_S.tolist(), end_of_text)
        generated += new
        if tell is not None:
            tell(new)
        counts += DraftCounts(len(draft_J), min(len(new), len(new_S) - 1), len(new), 1)
    return generated, counts


def distribution_of(params: SampleParams) -> Distribution:
    """Return the function from logits to probabilities; without `do_sample`, the most probable token gets 1."""
    if not params.do_sample:
        return lambda logits_SV: F.one_hot(logits_SV.argmax(dim=-1), logits_SV.shape[-1]).float()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    no_ids = torch.empty(0, dtype=torch.long)  # these three read the logits alone
    return lambda logits_SV: warpers(cast(torch.LongTensor, no_ids), logits_SV.float()).softmax(dim=-1)


def rejection_sample(draft_J: Tensor, q_JV: Tensor, p_SV: Tensor) -> Tensor:
    """Return the accepted drafts and the trunk's token after them, so at least one token.

    `p_SV` are the trunk's distributions at the drafts and after them: S = J + 1.
    """
    num_drafts = len(draft_J)
    index_J1 = draft_J[:, None]
    ratio_J = (p_SV[:num_drafts].gather(1, index_J1) / q_JV.gather(1, index_J1))[:, 0]
    num_accepted = int((torch.rand_like(ratio_J) < ratio_J).cumprod(dim=0).sum())
    residual_V = p_SV[num_accepted]
    if num_accepted < num_drafts:
        residual_V = (residual_V - q_JV[num_accepted]).clamp(min=0)
    if not residual_V.any():  # p and q differ by rounding only
        residual_V = p_SV[num_accepted]
    return torch.cat([draft_J[:num_accepted], torch.multinomial(residual_V, 1)])


def up_to(tokens: list[int], last: int) -> list[int]:
    """Return `tokens` up to and including the first `last`; all of them if there is none."""
    return tokens[: tokens.index(last) + 1] if last in tokens else tokens


class OneLayerCache(DynamicCache):
    """The latent cache of one MTP module; the module's layer number in the whole model is ignored."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append latents and rotary keys; return all of them."""
        return super().update(key_states, value_states, 0, *args, **kwargs)


class Drafter:
    """Drafts tokens with the MTP modules, and holds their caches."""

    def __init__(self, model: PreTrainedModel, distribution: Distribution) -> None:
        self._model = cast(ExportedModel, model)
        self._distribution = distribution
        self._modules = list(self._model.model.layers)[model.config.num_hidden_layers :]
        self._caches = [OneLayerCache() for _ in self._modules]
        width, device = model.config.hidden_size, model.device
        self._state_BSD = torch.empty(1, 0, width, dtype=model.dtype, device=device)
        """The trunk's states of all tokens but the last."""
        self._no_drafts = (
            torch.empty(0, dtype=torch.long, device=device),
            torch.empty(0, model.config.vocab_size, device=device),
        )

    def append_states(self, state_BSD: Tensor) -> None:
        """Append the trunk's states of further tokens."""
        self._state_BSD = torch.cat([self._state_BSD, state_BSD], dim=1)

    def draft(self, ids_BS: Tensor, max_drafts: int) -> tuple[Tensor, Tensor]:
        """Return drafts of the next tokens, (J), and the distributions they were drawn from, (J, V).

        There are none before the trunk has read the prompt. Draws from torch's global generator.
        """
        draft_J, q_JV = self._no_drafts
        if self._state_BSD.shape[1] == 0:
            return draft_J, q_JV
        trunk = self._model.model
        # Module k reads tokens up to k after a position, so its last k - 1 cache entries depend on drafts. All caches
        # are cropped equally, because each module reads the states of the one before.
        start = self._caches[0].get_seq_length()
        state_BSD = self._state_BSD[:, start:]
        drafting = zip(self._modules[: max(0, max_drafts)], self._caches, strict=False)
        for depth, (module, cache) in enumerate(drafting, start=1):
            later_BSD = trunk.embed_tokens(torch.cat([ids_BS, draft_J[None]], dim=1)[:, start + depth :])
            context = trunk.attention_context(later_BSD, None, None, cache)
            state_BSD = module(state_BSD, later_BSD, **context)
            q_JV = torch.cat([q_JV, self._distribution(self._model.lm_head(state_BSD[:, -1]))])
            draft_J = torch.cat([draft_J, torch.multinomial(q_JV[-1], 1)])
            cache.crop(-min(len(self._modules) - 1, cache.get_seq_length()))
        return draft_J, q_JV

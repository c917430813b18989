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
from dsv3.export.interface import ExportedModel, Trunk
from dsv3.generation.decoder import Decoder, is_decodable, threads_for
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
    distribution = distribution_of(params)
    reader = Decoder(model, len(prompt) + params.max_new_tokens) if is_decodable(model) else Reader(model)
    drafter = Drafter(reader, distribution)
    tokens, generated, counts = list(prompt), list[int](), DraftCounts()
    with threads_for(model):
        while len(generated) < params.max_new_tokens and generated[-1:] != [end_of_text]:
            # The trunk adds a token to the accepted drafts, so there is one draft fewer than tokens missing.
            drafts, q_JV = drafter.draft(tokens, max_drafts=params.max_new_tokens - len(generated) - 1)
            state_SD = reader.read([*tokens, *drafts][reader.length :])
            p_SV = distribution(reader.logits(state_SD[-1 - len(drafts) :]))
            accepted = rejection_sample(drafts, q_JV, p_SV)
            num_rejected = len(drafts) + 1 - len(accepted)
            reader.length -= num_rejected
            drafter.append_states(state_SD[: len(state_SD) - num_rejected])
            tokens += accepted
            new = up_to(accepted, end_of_text)
            generated += new
            if tell is not None:
                tell(new)
            counts += DraftCounts(len(drafts), min(len(new), len(accepted) - 1), len(new), 1)
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


def rejection_sample(drafts: Sequence[int], q_JV: Sequence[Tensor], p_SV: Tensor) -> list[int]:
    """Return the accepted drafts and the trunk's token after them, so at least one token.

    `p_SV` are the trunk's distributions at the drafts and after them: S = J + 1.
    """
    accepted: list[int] = []
    for token, q_V, p_V in zip(drafts, q_JV, p_SV, strict=False):
        if float(torch.rand(())) * float(q_V[token]) >= float(p_V[token]):
            residual_V = (p_V - q_V).clamp(min=0)
            break
        accepted.append(token)
    else:
        residual_V = p_SV[len(drafts)]
    if not residual_V.any():  # p and q differ by rounding only
        residual_V = p_SV[len(accepted)]
    return [*accepted, int(torch.multinomial(residual_V, 1))]


def up_to(tokens: list[int], last: int) -> list[int]:
    """Return `tokens` up to and including the first `last`; all of them if there is none."""
    return tokens[: tokens.index(last) + 1] if last in tokens else tokens


class Reader:
    """The trunk with the cache of one text, on any device: what `Decoder` is on a CPU."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = cast(ExportedModel, model)
        self._device = model.device
        self._cache = DynamicCache()
        layers = list(self._model.model.layers)[model.config.num_hidden_layers :]
        self.modules = [ModuleReader(self._model.model, layer) for layer in layers]
        """The multi-token prediction modules."""

    @property
    def length(self) -> int:
        """Tokens that were read. A smaller number forgets those from there on."""
        return self._cache.get_seq_length()

    @length.setter
    def length(self, length: int) -> None:
        crop(self._cache, length)

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Read further tokens; return the normalized state of each, (S, D)."""
        ids_BS = torch.tensor([tokens], device=self._device)
        return self._model.model(ids_BS, past_key_values=self._cache, use_cache=True).last_hidden_state[0]

    def embed(self, ids_S: Tensor) -> Tensor:
        """Return the tokens' embeddings, (S, D)."""
        return self._model.model.embed_tokens(ids_S.to(self._device))

    def logits(self, state_SD: Tensor) -> Tensor:
        """Return the logits of states, (S, V)."""
        return self._model.lm_head(state_SD)


class OneLayerCache(DynamicCache):
    """The latent cache of one MTP module; the module's layer number in the whole model is ignored."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append latents and rotary keys; return all of them."""
        return super().update(key_states, value_states, 0, *args, **kwargs)


class ModuleReader:
    """A multi-token prediction module with the cache of its own positions."""

    def __init__(self, trunk: Trunk, module: Callable[..., Tensor]) -> None:
        self._trunk, self._module, self._cache = trunk, module, OneLayerCache()

    def read(self, state_SD: Tensor, later_SD: Tensor, start: int) -> Tensor:
        """Return the module's states of positions from `start` on, (S, D), from states and later embeddings."""
        crop(self._cache, start)
        context = self._trunk.attention_context(later_SD[None], None, None, self._cache)
        return self._module(state_SD[None], later_SD[None], **context)[0]


def crop(cache: DynamicCache, length: int) -> None:
    """Forget what follows the first `length` entries."""
    cache.crop(min(0, length - cache.get_seq_length()))


class Drafter:
    """Drafts tokens with the MTP modules, from the trunk's states."""

    def __init__(self, reader: Reader | Decoder, distribution: Distribution) -> None:
        self._reader, self._distribution = reader, distribution
        self._state_SD: Tensor | None = None
        """The trunk's states from position `_start` to the last token but one."""
        self._start = 0

    def append_states(self, state_SD: Tensor) -> None:
        """Append the trunk's states of further tokens."""
        self._state_SD = state_SD if self._state_SD is None else torch.cat([self._state_SD, state_SD])

    def draft(self, tokens: Sequence[int], max_drafts: int) -> tuple[list[int], list[Tensor]]:
        """Return drafts of the tokens after `tokens`, and the distributions (V) that they were drawn from.

        There are none before the trunk has read the prompt. Draws from torch's global generator.
        """
        drafts, q_JV = list[int](), list[Tensor]()
        if self._state_SD is None or max_drafts <= 0:
            return drafts, q_JV
        state_SD, start = self._state_SD, self._start
        for depth, module in enumerate(self._reader.modules[:max_drafts], start=1):
            later_SD = self._reader.embed(torch.tensor([*tokens, *drafts][start + depth :]))
            state_SD = module.read(state_SD, later_SD, start)
            q_JV.append(self._distribution(self._reader.logits(state_SD[-1:]))[0])
            drafts.append(int(torch.multinomial(q_JV[-1], 1)))
        # Module k reads tokens up to k after a position, so its last k - 1 states depend on drafts. All modules read as
        # many again, because each reads the states of the one before.
        num_final = max(0, len(self._state_SD) - (len(self._reader.modules) - 1))
        self._start, self._state_SD = start + num_final, self._state_SD[num_final:]
        return drafts, q_JV

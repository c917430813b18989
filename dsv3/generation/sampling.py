"""Text of the exported model: continuations of prompts.

A single one on a CPU is written by `dsv3.generation.decoder`, others by transformers' `generate`; where the model's own
multi-token prediction (MTP) modules draft, by `dsv3.generation.speculative`.

Letters: V vocab_size
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from dsv3.errors import UserError
from dsv3.generation.decoder import Decoder, is_decodable, threads_for
from dsv3.generation.speculative import (
    DraftCounts,
    check_has_mtp_modules,
    distribution_of,
    generate_speculatively,
)
from dsv3.markdown import code_span, fenced, table
from dsv3.params.sample import SampleParams


@dataclass(frozen=True)
class Sample:
    """One prompt and its continuations."""

    prompt: str
    continuations: tuple[str, ...]
    num_new_tokens: int
    """Over all continuations."""

    drafts: DraftCounts | None = None
    """Counts of drafts over all continuations; None without speculative decoding."""


def generation_config(params: SampleParams, end_of_text: Any) -> GenerationConfig:
    """Return how tokens are chosen. Settings of sampling are left out in greedy decoding."""
    sampling = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
    return GenerationConfig(
        max_new_tokens=params.max_new_tokens,
        do_sample=params.do_sample,
        num_return_sequences=params.num_return_sequences,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        **(sampling if params.do_sample else {}),
    )


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the prompt's ids behind bos, or eos where there is no bos: every document in training begins so too.

    It is the rule of `dsv3.data.tokenizer.special_tokens`.
    """
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    assert isinstance(begin, int)
    return [begin, *tokenizer.encode(prompt, add_special_tokens=False)]


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, params: SampleParams) -> None:
    """Raise `UserError` if the model has no MTP modules to draft with, or too few positions.

    The longest prompt and `max_new_tokens` must fit together.
    """
    if params.speculative:
        check_has_mtp_modules(model)
    limit = model.config.max_position_embeddings
    room = limit - max(len(prompt_tokens(tokenizer, prompt)) for prompt in params.prompts)
    if params.max_new_tokens > room:
        raise UserError(
            f"params.yaml: sample.max_new_tokens is {params.max_new_tokens}; must be <= {room}, so that the longest "
            f"prompt and what follows fit the model's {limit} positions"
        )


def sample_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    params: SampleParams,
    seed: int,
    progress: Callable[[int], object] = lambda num_prompts: None,
) -> list[Sample]:
    """Return the samples of every prompt; `progress` is called with 1 after each.

    Prompt number n has the seed `seed` + n: another prompt in the list does not change what follows this one.
    """
    samples = []
    for number, prompt in enumerate(params.prompts):
        samples.append(sample(model, tokenizer, prompt, params, seed + number))
        progress(1)
    return samples


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, params: SampleParams, seed: int
) -> Sample:
    """Return the continuations of `prompt`; the same arguments give the same text on the same machine."""
    ids, end_of_text = prompt_tokens(tokenizer, prompt), cast(int, tokenizer.eos_token_id)
    torch.manual_seed(seed)
    drafts: DraftCounts | None = None
    if params.speculative:
        results = [generate_speculatively(model, ids, params, end_of_text) for _ in range(params.num_return_sequences)]
        rows, drafts = [row for row, _ in results], sum((counts for _, counts in results), DraftCounts())
    else:
        rows = generate(model, ids, params, end_of_text)
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return Sample(prompt, tuple(texts), sum(token != end_of_text for row in rows for token in row), drafts)


def generate(
    model: PreTrainedModel,
    ids: list[int],
    params: SampleParams,
    end_of_text: int,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Return the continuations of `ids`, padded with `end_of_text` to equal lengths.

    They are the tokens that transformers' `generate` returns, by it, or by `Decoder`: one text on a CPU. Several share
    what `generate` costs beside the arithmetic.
    """
    if params.num_return_sequences == 1 and is_decodable(model):
        with threads_for(model):
            return [decode(model, ids, params, end_of_text, streamer)]
    prompt_ids = torch.tensor([ids], device=model.device)
    own_generate = cast(Callable[..., torch.Tensor], model.generate)  # torch annotates attributes as tensors
    sequences = own_generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        generation_config=generation_config(params, end_of_text),
        streamer=streamer,
    )
    return sequences[:, len(ids) :].tolist()


@torch.inference_mode()
def decode(
    model: PreTrainedModel, ids: list[int], params: SampleParams, end_of_text: int, streamer: BaseStreamer | None
) -> list[int]:
    """Return the tokens that `generate` does, for one continuation; draws from torch's global generator."""
    distribution, decoder = distribution_of(params), Decoder(model, len(ids) + params.max_new_tokens)
    row, unread = list[int](), ids
    if streamer is not None:
        streamer.put(torch.tensor(ids))
    while len(row) < params.max_new_tokens and row[-1:] != [end_of_text]:
        logits_1V = decoder.logits(decoder.read(unread)[-1:])
        chosen = torch.multinomial(distribution(logits_1V), 1) if params.do_sample else logits_1V.argmax()
        unread = [int(chosen)]
        row += unread
        if streamer is not None:
            streamer.put(torch.tensor(unread))
    if streamer is not None:
        streamer.end()
    return row


def total_drafts(samples: Sequence[Sample]) -> DraftCounts | None:
    """Return the counts of drafts over all samples; None without speculative decoding."""
    counts = [item.drafts for item in samples if item.drafts is not None]
    return sum(counts, DraftCounts()) if counts else None


BEGINNING = re.compile(rb"# Samples\n")
"""What the page begins with."""


def markdown(samples: list[Sample], params: SampleParams, seed: int, record: Mapping[str, Any]) -> str:
    """Return the samples as a Markdown page, with the model and the settings that generated them."""
    drafts = total_drafts(samples)
    speculation = {} if drafts is None else {"speculation": str(drafts)}
    rows = {**training_run(record), **decoding_settings(params, seed), **speculation}
    lines = ["# Samples", "", table(["", ""], ["---", "---"], rows.items())]
    for item in samples:
        for number, continuation in enumerate(item.continuations, start=1):
            suffix = f" ({number} of {len(item.continuations)})" if len(item.continuations) > 1 else ""
            lines += ["", f"## {code_span(item.prompt)}{suffix}", "", *fenced(item.prompt + continuation)]
    return "\n".join(lines) + "\n"


def training_run(record: Mapping[str, Any]) -> dict[str, str]:
    """Return name, commit and data of the training that wrote the model, from its run.json."""
    dvc = record["dvc"]
    commit = (dvc.get("git_sha") or "unknown")[:12] + (" with changes" if dvc.get("git_dirty") else "")
    return {
        "run": f"{record['name']} ({record['experiment']})",
        "commit": commit,
        "data": str(dvc.get("data_source") or "unknown"),
    }


def decoding_settings(params: SampleParams, seed: int) -> dict[str, str]:
    """Return how the tokens were chosen, in words."""
    chosen = (
        f"temperature {params.temperature:g}, top-p {params.top_p:g}, "
        + (f"top-k {params.top_k}" if params.top_k else "no top-k")
        if params.do_sample
        else "the most probable token each time"
    )
    return {"decoding": chosen, "new tokens": f"at most {params.max_new_tokens}", "seed": str(seed)}

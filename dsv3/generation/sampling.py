"""What the exported model writes: prompts in, continuations out.

Through transformers' `generate`, or through `dsv3.generation.speculative` where the model's own prediction modules
draft.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dsv3.errors import UserError
from dsv3.generation.speculative import DraftCounts, check_predicts_ahead, speculated
from dsv3.params.sample import SampleParams


@dataclass(frozen=True)
class Sample:
    """One prompt and what followed it."""

    prompt: str
    continuations: tuple[str, ...]
    num_new_tokens: int
    """Over all continuations."""

    drafts: DraftCounts | None = None
    """How the drafts fared, over all continuations; None without speculation."""


def generation_config(params: SampleParams, end_of_text: Any) -> GenerationConfig:
    """Return how tokens are chosen. Settings of sampling are left out when the most probable token is taken."""
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
    """Return the prompt's ids behind the end-of-text token, which precedes every document in training too."""
    assert isinstance(tokenizer.eos_token_id, int)
    return [tokenizer.eos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, params: SampleParams) -> None:
    """Raise `UserError` where the model has no prediction modules to draft with, or too few positions.

    The longest prompt must leave room for `max_new_tokens`.
    """
    if params.speculative:
        check_predicts_ahead(model)
    limit = model.config.max_position_embeddings
    room = limit - max(len(prompt_tokens(tokenizer, prompt)) for prompt in params.prompts)
    if params.max_new_tokens > room:
        raise UserError(
            f"params.yaml: sample.max_new_tokens is {params.max_new_tokens}; must be <= {room}, so that the longest "
            f"prompt and what follows fit the model's {limit} positions"
        )


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, params: SampleParams, seed: int
) -> Sample:
    """Return the continuations of `prompt`; the same arguments give the same text on the same machine."""
    ids, end_of_text = prompt_tokens(tokenizer, prompt), cast(int, tokenizer.eos_token_id)
    torch.manual_seed(seed)
    drafts: DraftCounts | None = None
    if params.speculative:
        written = [speculated(model, ids, params, end_of_text) for _ in range(params.num_return_sequences)]
        rows, drafts = [row for row, _ in written], sum((counts for _, counts in written), DraftCounts())
    else:
        rows = _generated(model, ids, params, end_of_text)
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return Sample(prompt, tuple(texts), sum(token != end_of_text for row in rows for token in row), drafts)


def _generated(model: PreTrainedModel, ids: list[int], params: SampleParams, end_of_text: int) -> list[list[int]]:
    """Return what follows `ids` by transformers' `generate`, filled up with `end_of_text` to equal lengths."""
    prompt_ids = torch.tensor([ids], device=model.device)
    generate = cast(Callable[..., torch.Tensor], model.generate)  # torch annotates a module's attributes as tensors
    written = generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        generation_config=generation_config(params, end_of_text),
    )
    return written[:, len(ids) :].tolist()


def drafts_of(samples: Sequence[Sample]) -> DraftCounts | None:
    """Return how the drafts of all samples fared; None without speculation."""
    counts = [item.drafts for item in samples if item.drafts is not None]
    return sum(counts, DraftCounts()) if counts else None


def markdown(samples: list[Sample], params: SampleParams, seed: int, record: Mapping[str, Any]) -> str:
    """Return the samples as a Markdown page with the settings and the model that wrote them."""
    lines = ["# Samples", "", "| | |", "|---|---|"]
    drafts = drafts_of(samples)
    speculation = {} if drafts is None else {"speculation": str(drafts)}
    rows = {**provenance(record), **settings(params, seed), **speculation}
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    for item in samples:
        for number, continuation in enumerate(item.continuations, start=1):
            suffix = f" ({number} of {len(item.continuations)})" if len(item.continuations) > 1 else ""
            text = item.prompt + continuation
            fence = "`" * max(3, _longest_run(text, "`") + 1)
            lines += ["", f"## {_heading(item.prompt)}{suffix}", "", f"{fence}text", text.rstrip("\n"), fence]
    return "\n".join(lines) + "\n"


def provenance(record: Mapping[str, Any]) -> dict[str, str]:
    """Return which training wrote the model, from its run.json."""
    dvc = record["dvc"]
    commit = (dvc.get("git_sha") or "unknown")[:12] + (" with changes" if dvc.get("git_dirty") else "")
    return {
        "run": f"{record['name']} ({record['experiment']})",
        "commit": commit,
        "data": str(dvc.get("data_source") or "unknown"),
    }


def settings(params: SampleParams, seed: int) -> dict[str, str]:
    """Return how the tokens were chosen, in words."""
    chosen = (
        f"temperature {params.temperature:g}, top-p {params.top_p:g}, "
        + (f"top-k {params.top_k}" if params.top_k else "no top-k")
        if params.do_sample
        else "the most probable token each time"
    )
    return {"decoding": chosen, "new tokens": f"at most {params.max_new_tokens}", "seed": str(seed)}


def _heading(prompt: str) -> str:
    return "`" + prompt.strip().replace("\n", " ").replace("`", "'") + "`"


def _longest_run(text: str, character: str) -> int:
    """Return the length of the longest run of `character` in `text`."""
    longest = current = 0
    for letter in text:
        current = current + 1 if letter == character else 0
        longest = max(longest, current)
    return longest

"""What the exported model writes: prompts in, continuations out, through transformers' `generate`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dsv3.errors import UserError
from dsv3.evaluation_params import SampleParams


@dataclass(frozen=True)
class Sample:
    """One prompt and what followed it."""

    prompt: str
    continuations: tuple[str, ...]
    num_new_tokens: int
    """Over all continuations."""


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


def check_lengths(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, params: SampleParams) -> None:
    """Raise `UserError` where the longest prompt leaves no room for `max_new_tokens` in the model's positions."""
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
    ids, end_of_text = prompt_tokens(tokenizer, prompt), tokenizer.eos_token_id
    torch.manual_seed(seed)
    prompt_ids = torch.tensor([ids], device=model.device)
    generate = cast(Callable[..., torch.Tensor], model.generate)  # torch annotates a module's attributes as tensors
    written = generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        generation_config=generation_config(params, end_of_text),
    )
    rows = written[:, len(ids) :]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return Sample(prompt, tuple(texts), int(rows.ne(cast(int, end_of_text)).sum()))


def markdown(samples: list[Sample], params: SampleParams, seed: int, record: Mapping[str, Any]) -> str:
    """Return the samples as a Markdown page with the settings and the model that wrote them."""
    lines = ["# Samples", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in {**provenance(record), **settings(params, seed)}.items()]
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

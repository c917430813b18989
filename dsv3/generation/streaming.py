"""Text that is handed on while it is generated, each character as soon as its last byte is there."""

from collections.abc import Callable
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from dsv3.generation.sampling import generate
from dsv3.generation.speculative import DraftCounts, generate_speculatively
from dsv3.params.sample import SampleParams


class TextStream(BaseStreamer):
    """Writes the text of the tokens that `generate` adds to a prompt, without special tokens.

    A token may end within a character: its bytes are held back until the character is whole, and dropped if the text
    ends before.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._parts: list[str] = []
        self._has_prompt = False

    @property
    def text(self) -> str:
        """Return all that was written."""
        return "".join(self._parts)

    def put(self, value: Any) -> None:
        """Take what `generate` gives: the prompt first, then a token at a time."""
        if self._has_prompt:
            self.add(value.flatten().tolist())
        self._has_prompt = True

    def add(self, tokens: list[int]) -> None:
        """Write the text that further tokens make whole."""
        for token in tokens:
            part = self._decoder.step(self._tokenizer, token)
            if part:
                self._parts.append(part)
                self._write(part)

    def end(self) -> None:
        """Do nothing: what is held back is no whole character."""


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    params: SampleParams,
    seed: int,
    write: Callable[[str], None],
) -> tuple[str, DraftCounts | None]:
    """Write the continuation of `ids` as it is generated; return it, and the drafts' counts with `params.speculative`.

    It is the text that `dsv3.generation.sampling.sample` returns for the same seed.
    """
    torch.manual_seed(seed)
    backend, end_of_text = cast(Any, tokenizer).backend_tokenizer, cast(int, tokenizer.eos_token_id)
    text = TextStream(backend, write)
    if params.speculative:
        _, drafts = generate_speculatively(model, ids, params, end_of_text, text.add)
        return text.text, drafts
    generate(model, ids, params, end_of_text, text)
    return text.text, None

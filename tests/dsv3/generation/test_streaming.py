import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dsv3.generation.sampling import prompt_tokens, sample
from dsv3.generation.streaming import TextStream, stream
from dsv3.params.sample import SampleParams
from tests.drafting_model import drafting_model


def settings(**changes) -> SampleParams:
    defaults = {"prompts": ["-"], "max_new_tokens": 40, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return SampleParams(**{**defaults, "num_return_sequences": 1, "speculative": False, **changes})


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """A byte is a token: those of a text that begins with these bytes, whole characters or not."""
    bytes_of = {tokenizer.encode(chr(number)).ids[0]: number for number in range(128)}
    by_byte = {number: token for token, number in bytes_of.items()}
    for start in range(0x80, 0x10000, 0x40):
        if not 0xD800 <= start < 0xE000:
            encoded = chr(start).encode()
            by_byte.update(zip(encoded, tokenizer.encode(chr(start)).ids, strict=True))
    for number in range(0x80, 0xC0):
        by_byte[number] = tokenizer.encode(chr(number)).ids[1]
    by_byte.update(zip("😀".encode(), tokenizer.encode("😀").ids, strict=True))
    return [by_byte[byte] for byte in data]


def written(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    parts: list[str] = []
    text = TextStream(tokenizer.backend_tokenizer, parts.append)
    text.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        text.put(torch.tensor([token]))
    text.end()
    assert text.text == "".join(parts)
    return parts


def test_a_character_of_several_tokens_is_written_when_it_is_whole(tokenizer):
    ids = byte_ids(tokenizer.backend_tokenizer, "aÄ €😀\nb".encode())
    assert written(tokenizer, ids) == ["a", "Ä", " ", "€", "😀", "\n", "b"]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_half_a_character_at_the_end_is_not_written(tokenizer, cut):
    ids = byte_ids(tokenizer.backend_tokenizer, b"a" + "😀".encode()[:-cut])
    assert written(tokenizer, ids) == ["a"]


def test_the_end_of_a_text_is_not_written(tokenizer):
    assert written(tokenizer, [*tokenizer.encode("king"), 0]) == ["k", "i", "n", "g"]


@given(ids=st.lists(st.integers(0, 256), max_size=30))
def test_parts_add_up_to_the_text_whatever_the_tokens(tokenizer, ids):
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    text = "".join(written(tokenizer, ids))
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\ufffd"}


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_text_is_the_one_of_sample_and_comes_in_parts(tokenizer, speculative, do_sample):
    model = drafting_model("sometimes", 1)
    params = settings(do_sample=do_sample, speculative=speculative)
    parts: list[str] = []
    text, drafts = stream(model, tokenizer, prompt_tokens(tokenizer, "the"), params, 5, parts.append)
    item = sample(model, tokenizer, "the", params, seed=5)
    assert text == "".join(parts) == item.continuations[0].rstrip("\ufffd")
    assert drafts == item.drafts
    assert len(parts) > 5

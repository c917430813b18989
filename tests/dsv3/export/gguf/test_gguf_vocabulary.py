import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split, Whitespace

from dsv3.artifacts import write_json
from dsv3.data.tokenizer import END_OF_TEXT, read_tokenizer, save_trained, train_tokenizer
from dsv3.errors import UserError
from dsv3.export.gguf.vocabulary import PRE_TOKENIZERS, vocabulary_metadata

TEXTS = ["To be, or not to be: that's the question. " * 9, "The king is dead; long live the king!\n\n" * 9]
DEEPSEEK = next(patterns for patterns, name in PRE_TOKENIZERS.items() if name == "deepseek-v3")
CUTTERS = {
    "a space put first": ByteLevel(add_prefix_space=True),
    "words and nothing between": Whitespace(),
    "another pattern": Sequence([Split(Regex(r"\d"), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]),
    "DeepSeek's patterns, joined": Sequence(
        [
            *(Split(Regex(pattern), "merged_with_previous") for pattern in DEEPSEEK),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "DeepSeek's patterns and GPT-2's": Sequence(
        [*(Split(Regex(pattern), "isolated") for pattern in DEEPSEEK), ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "trained"
    save_trained(train_tokenizer(TEXTS, 300), path)
    return path


def with_pieces(tmp_path, **pieces):
    """A trained tokenizer with another pre-tokenizer or normalizer."""
    tokenizer = train_tokenizer(TEXTS, 300)
    for name, piece in pieces.items():
        setattr(tokenizer, name, piece)
    save_trained(tokenizer, tmp_path / "other")
    return tmp_path / "other"


def rebuilt(values):
    """A tokenizer from the metadata alone, splitting text as GPT-2 does."""
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    vocabulary = {text: token_id for token_id, text in enumerate(values["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return tokenizer


def test_every_text_is_cut_as_the_tokenizer_cuts_it(folder):
    other, tokenizer = rebuilt(vocabulary_metadata(folder, 320)), read_tokenizer(folder)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.text() | st.lists(st.sampled_from(["the ", "king", "'ll", " \n", "To be", "12"])).map("".join))
    def check(text):
        assert other.encode(text).ids == tokenizer.encode(text).ids

    check()


def test_rows_without_a_token_are_unused_and_the_end_of_text_is_a_control_token(folder):
    values = vocabulary_metadata(folder, 320)
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    size = read_tokenizer(folder).get_vocab_size()
    assert len(tokens) == len(types) == len(set(tokens)) == 320
    assert (tokens[0], types[0]) == (END_OF_TEXT, 3)
    assert set(types[1:size]) == {1}
    assert set(types[size:]) == {5}
    assert tokens[-1] == "[PAD319]"
    assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"]) == (0, 0)


def test_an_added_token_that_is_not_special_is_the_users(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_tokens([AddedToken("<tab>", special=False)])
    save_trained(tokenizer, tmp_path / "other")
    values = vocabulary_metadata(tmp_path / "other", 320)
    assert values["tokenizer.ggml.token_type"][values["tokenizer.ggml.tokens"].index("<tab>")] == 4


def test_a_prompt_begins_as_a_document_does(folder):
    assert vocabulary_metadata(folder, 320)["tokenizer.ggml.add_bos_token"] is True


def test_deepseeks_own_way_of_cutting_is_recognized(tmp_path):
    encoder = ByteLevel(add_prefix_space=False, use_regex=False)
    splits = [Split(Regex(pattern), "isolated") for pattern in DEEPSEEK]
    other = with_pieces(tmp_path, pre_tokenizer=Sequence([*splits, encoder]))
    assert vocabulary_metadata(other, 320)["tokenizer.ggml.pre"] == "deepseek-v3"


@pytest.mark.parametrize("cutter", CUTTERS.values(), ids=CUTTERS.keys())
def test_a_tokenizer_that_cuts_in_another_way_is_refused(tmp_path, cutter):
    with pytest.raises(UserError, match=r"tokenizer.json: splits text .* must be .* gpt-2, deepseek-v3"):
        vocabulary_metadata(with_pieces(tmp_path, pre_tokenizer=cutter), 320)


def test_a_tokenizer_that_changes_the_text_first_is_refused(tmp_path):
    with pytest.raises(UserError, match="must be"):
        vocabulary_metadata(with_pieces(tmp_path, normalizer=NFC()), 320)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    tokenizer = Tokenizer(WordLevel({END_OF_TEXT: 0, "be": 1}, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    save_trained(tokenizer, tmp_path / "other")
    with pytest.raises(UserError, match="must be a byte-level BPE"):
        vocabulary_metadata(tmp_path / "other", 320)


def test_a_tokenizer_without_merges_is_refused(tmp_path):
    save_trained(train_tokenizer([""], 257), tmp_path / "bytes")
    with pytest.raises(UserError, match=r"has no merges; .* raise tokenize.vocab_size"):
        vocabulary_metadata(tmp_path / "bytes", 320)


def test_more_tokens_than_rows_are_refused(folder):
    with pytest.raises(UserError, match=r"vocab_size in config.json is 256"):
        vocabulary_metadata(folder, 256)


def test_special_tokens_are_those_that_the_configuration_names(tmp_path, folder):
    other = with_pieces(tmp_path)
    configuration = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(other / "tokenizer_config.json", configuration | {"bos_token": "!"})
    values = vocabulary_metadata(other, 320)
    assert values["tokenizer.ggml.tokens"][values["tokenizer.ggml.bos_token_id"]] == "!"
    assert values["tokenizer.ggml.eos_token_id"] == 0

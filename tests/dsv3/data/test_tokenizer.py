import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from dsv3.data import words as words_module
from dsv3.data.tokenizer import (
    END_OF_TEXT,
    copy_pretrained,
    num_ids,
    read_tokenizer,
    save_trained,
    special_tokens,
    splits_at_word_borders,
    train_tokenizer,
)
from dsv3.data.words import MAX_WORD_CHARACTERS, short_words
from dsv3.errors import UserError

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n\n" * 20
STRANGE = "ROMEO:\n  Ay me!\t– “naïve” 雪 👩‍🚀 \x00 <|endoftext|> .  , ' n't do n't\r\n"
EMPTY = Tokenizer(BPE()).to_str()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "tokenizer"
    save_trained(train_tokenizer([TEXT], 300), directory)
    return directory


def test_a_trained_tokenizer_has_the_asked_size_and_end_of_text_as_id_0(folder):
    tokenizer = read_tokenizer(folder)
    assert num_ids(tokenizer) == 300
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert special_tokens(tokenizer, folder).bos_token_id == special_tokens(tokenizer, folder).eos_token_id == 0
    assert len(tokenizer.encode(TEXT).ids) < len(TEXT) / 2


def test_training_twice_gives_the_same_file_also_in_another_process(folder, tmp_path):
    code = (
        "import sys; from pathlib import Path; from dsv3.data.tokenizer import *\n"
        "save_trained(train_tokenizer(iter([sys.argv[1]]), 300), Path(sys.argv[2]))"
    )
    root = Path(__file__).parents[3]
    for seed in ("1", "2"):
        environment = {"PYTHONPATH": str(root), "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": "true"}
        again = tmp_path / seed
        subprocess.run([sys.executable, "-c", code, TEXT, str(again)], check=True, env=environment)
        assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@settings(max_examples=80, deadline=None)
@given(text=st.text() | st.just(STRANGE))
def test_any_text_is_spelt_exactly_and_its_end_of_text_is_plain_characters(folder, text):
    tokenizer = read_tokenizer(folder)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert 0 not in ids


@pytest.mark.parametrize("text", [TEXT, STRANGE, " leading", "trailing ", "don 't , you ?"])
def test_transformers_loads_the_folder_alone_and_decodes_exactly(folder, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 0, 300)
    plain = text.replace("<|endoftext|>", "")
    assert tokenizer.encode(plain) == read_tokenizer(folder).encode(plain, add_special_tokens=False).ids


def test_a_pretrained_folder_is_copied_and_its_special_tokens_are_found_in_its_configuration(folder, tmp_path):
    other = tmp_path / "other"
    save_trained(train_tokenizer([TEXT], 280), other)
    edited = json.loads((other / "tokenizer.json").read_text())
    edited["added_tokens"].append(edited["added_tokens"][0] | {"id": 280, "content": "<s>"})
    (other / "tokenizer.json").write_text(json.dumps(edited))
    (other / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "<|endoftext|>"})
    )
    copy_pretrained(str(other), tmp_path / "copy")
    tokenizer = read_tokenizer(tmp_path / "copy")
    assert num_ids(tokenizer) == 281
    special = special_tokens(tokenizer, tmp_path / "copy")
    assert (special.bos_token_id, special.eos_token_id) == (280, 0)


@pytest.mark.parametrize(
    ("tokenizer", "config", "message"),
    [
        (None, "{}", "it has no tokenizer.json"),
        ("good", None, "names no eos_token that the tokenizer knows"),
        ("{}", "{}", "tokenizer.json: is no tokenizer"),
        ("good", "{}", "names no eos_token that the tokenizer knows"),
        ("good", '{"eos_token": "</s>"}', "names no eos_token that the tokenizer knows"),
        ("good", "eos", "tokenizer_config.json: is not JSON"),
        ("good", "[" * 100_000, "tokenizer_config.json: is not JSON"),
        ("good", "[]", "tokenizer_config.json: is no JSON object"),
        ("good", '{"eos_token": 3}', "eos_token is 3; must be a text"),
        *(
            ("good", f'{{"eos_token": "{END_OF_TEXT}", "{name}": {value}}}', f"{name} is .*; must be {wanted}; bring ")
            for name, value, wanted in (
                ("pad_token", "5", "a text"),
                ("pad_token", "true", "a text"),
                ("pad_token", '["<pad>"]', "a text"),
                ("pad_token", '{"content": 5}', "a text"),
                ("unk_token", "5", "a text"),
                ("model_max_length", '"x"', "a number"),
                ("model_max_length", "true", "a number"),
            )
        ),
        *(
            ("good", f'{{"eos_token": "{END_OF_TEXT}", "{name}": {value}}}', ": transformers can't use it .*; bring ")
            for name, value in (
                ("padding_side", '"up"'),
                ("additional_special_tokens", "5"),
                ("added_tokens_decoder", "5"),
                ("model_input_names", "5"),
                ("split_special_tokens", '"x"'),
            )
        ),
        (EMPTY, f'{{"eos_token": "{END_OF_TEXT}"}}', "tokenizer.json: has no tokens; bring another"),
    ],
)
def test_a_folder_that_is_no_tokenizer_is_told_in_one_line(folder, tmp_path, tokenizer, config, message):
    source = tmp_path / "source"
    source.mkdir()
    good = (folder / "tokenizer.json").read_text()
    for name, text in (
        ("tokenizer.json", good if tokenizer == "good" else tokenizer),
        ("tokenizer_config.json", config),
    ):
        if text is not None:
            (source / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        copy_pretrained(str(source), tmp_path / "copy")
    assert "\n" not in str(error.value)
    assert str(source) in str(error.value)


@pytest.mark.parametrize("name", ["chat_template.jinja", "config.json"])
def test_a_file_in_another_encoding_is_told_in_one_line(folder, tmp_path, name):
    """It is read where tokenizer_config.json names no eos."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (source / name).write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(UserError, match=f"{name}: is not UTF-8; bring another"):
        copy_pretrained(str(source), tmp_path / "copy")


def test_a_hub_id_that_cant_be_read_is_told_in_one_line(tmp_path):
    with pytest.raises(
        UserError, match=r"tokenize.tokenizer is nobody/nothing; no such folder, and tokenizer.json can't"
    ):
        copy_pretrained("nobody/nothing", tmp_path / "copy")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}},
        {"tokenizer_config.json": {"model_max_length": 1024}, "config.json": {"model_type": "gpt2"}},
        {"special_tokens_map.json": {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}}},
        {"tokenizer_config.json": {"eos_token": None}, "special_tokens_map.json": {"eos_token": "<|endoftext|>"}},
    ],
    ids=["class", "model's class", "map", "map behind a null"],
)
def test_special_tokens_are_found_wherever_transformers_keeps_them(folder, tmp_path, files):
    from transformers import AutoTokenizer

    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    (source / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (source / name).write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    copy_pretrained(str(source), copy)
    special = special_tokens(read_tokenizer(copy), copy)
    assert (special.bos_token_id, special.eos_token_id) == (0, 0)
    loaded = AutoTokenizer.from_pretrained(copy)
    assert loaded.eos_token_id == 0
    assert loaded.encode(TEXT, add_special_tokens=False) == read_tokenizer(folder).encode(TEXT).ids


def test_a_chat_template_comes_along_and_code_does_not(folder, tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    (source / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = {"eos_token": "<|endoftext|>", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "extra": 1}
    (source / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (source / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (source / "evil.py").write_text("", encoding="utf-8")
    copy_pretrained(str(source), copy)
    assert sorted(path.name for path in copy.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    written = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in written
    assert written["extra"] == 1


def test_a_tokenizer_is_found_at_home_and_in_the_workspace_of_an_experiment(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(folder.parent))
    copy_pretrained("~/tokenizer", tmp_path / "copy")
    monkeypatch.setenv("DVC_ROOT", str(folder.parent))
    copy_pretrained("tokenizer", tmp_path / "again")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (tmp_path / "again" / "tokenizer.json").read_bytes()


@settings(max_examples=80, deadline=None)
@given(words=st.lists(st.tuples(st.sampled_from(" \n"), st.integers(0, 3 * MAX_WORD_CHARACTERS)), max_size=8))
def test_a_text_is_cut_for_the_trainer_inside_long_words_only(words):
    text = "".join(border + "雪" * length for border, length in words)
    parts = list(short_words(text))
    assert "".join(parts) == text
    assert all(len(word) <= MAX_WORD_CHARACTERS for part in parts for word in part.split())
    if all(length <= MAX_WORD_CHARACTERS for _, length in words):
        assert parts == [text]


def test_a_text_without_spaces_reaches_the_trainer_in_short_words(monkeypatch):
    received = []

    def watched(words):
        received.extend(words)
        return iter(())

    monkeypatch.setattr("dsv3.data.tokenizer.repeated", watched)
    letters = "".join(random.Random(0).choices("ACGT", k=5000))
    train_tokenizer([letters], 300)
    assert max(map(len, received)) == MAX_WORD_CHARACTERS
    assert sum(map(len, received)) == len(letters)


def test_the_segments_that_are_counted_at_once_are_bounded_in_text_without_spaces(monkeypatch):
    counted = []
    add_words = words_module._add_words

    def watched(words, counts, pre_tokenizer):
        counted.append(sum(map(len, counts)))
        add_words(words, counts, pre_tokenizer)

    monkeypatch.setattr(words_module, "_add_words", watched)
    monkeypatch.setattr(words_module, "MAX_CHARACTERS", 1000)
    generator = random.Random(0)
    texts = ["".join(generator.choices("ACGT", k=400)) for _ in range(20)]
    assert (
        sum(words_module.word_counts(texts, ByteLevel(add_prefix_space=False)).values()) == 80
    )  # 128 + 128 + 128 + 16
    assert max(counted) <= 1400  # and the last text


SCRAPS = st.lists(
    st.sampled_from(["the king", " is", "\n\n", "  ", "\t", "'s", " 12", "naïve雪", ".\x1c", "aaa"]), max_size=40
)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(SCRAPS.map("".join), max_size=4), most=st.integers(0, 5))
def test_training_on_counted_words_gives_the_librarys_own_tokenizer(texts, most):
    """However often the segments that were counted are forgotten, and however long the repeated words may be."""
    own = Tokenizer(BPE())
    own.pre_tokenizer, own.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=290, min_frequency=2, special_tokens=[END_OF_TEXT], initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    own.train_from_iterator(texts, trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words_module, "MAX_CHARACTERS", most)
        patch.setattr(words_module, "REPEATED_CHARACTERS", 7)
        assert train_tokenizer(texts, 290).to_str() == own.to_str()


def test_tokens_are_looked_up_by_segment_only_where_segments_are_known_to_be_independent(folder):
    assert splits_at_word_borders(read_tokenizer(folder))
    changes = {
        "dropout": lambda tokenizer: setattr(tokenizer.model, "dropout", 0.1),
        "prefix": lambda tokenizer: setattr(tokenizer, "pre_tokenizer", ByteLevel(add_prefix_space=True)),
        "rule": lambda tokenizer: setattr(
            tokenizer, "pre_tokenizer", ByteLevel(add_prefix_space=False, use_regex=False)
        ),
        "normalizer": lambda tokenizer: setattr(tokenizer, "normalizer", Lowercase()),
        "added": lambda tokenizer: tokenizer.add_tokens(["to be"]),
    }
    for name, change in changes.items():
        tokenizer = read_tokenizer(folder)
        change(tokenizer)
        assert not splits_at_word_borders(tokenizer), name

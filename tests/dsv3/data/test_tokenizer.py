import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.tokenizer import (
    copy_pretrained,
    num_ids,
    read_tokenizer,
    save_trained,
    special_tokens,
    train_tokenizer,
)
from dsv3.errors import UserError

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n\n" * 20
STRANGE = "ROMEO:\n  Ay me!\t– “naïve” 雪 👩‍🚀 \x00 <|endoftext|> .  , ' n't do n't\r\n"


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
        ("{}", None, "it has no tokenizer_config.json"),
        ("{}", "{}", "tokenizer.json: is no tokenizer"),
        ("good", "{}", "names no eos_token that the tokenizer knows"),
        ("good", '{"eos_token": "</s>"}', "names no eos_token that the tokenizer knows"),
        ("good", "eos", "tokenizer_config.json: is not JSON"),
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
        special_tokens(read_tokenizer(tmp_path / "copy"), tmp_path / "copy")
    assert "\n" not in str(error.value)


def test_a_hub_id_that_cant_be_read_is_told_in_one_line(tmp_path):
    with pytest.raises(
        UserError, match=r"tokenize.tokenizer is nobody/nothing; no such folder, and tokenizer.json can't"
    ):
        copy_pretrained("nobody/nothing", tmp_path / "copy")

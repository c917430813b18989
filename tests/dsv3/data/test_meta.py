import json
import shutil

import numpy as np
import pytest

from dsv3.artifacts import sha256_file, sha256_lines
from dsv3.data.meta import check_shards, open_stream, read_meta
from dsv3.data.shards import write_shards
from dsv3.errors import UserError
from tests.damage import DAMAGES
from tests.training_inputs import write_tokens

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(folder, seed=0)
    return folder


@pytest.fixture
def tokens(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "tokens")


def checked(folder) -> str:
    meta = read_meta(folder)
    for split in SPLITS:
        open_stream(folder, meta, split)
    return check_shards(folder, meta, SPLITS)


def assert_refused(folder, match) -> None:
    with pytest.raises(UserError, match=match) as told:
        checked(folder)
    assert "\n" not in str(told.value)


def test_whole_shards_are_counted_in_a_line(tokens):
    size = sum(path.stat().st_size for path in tokens.glob("*.bin"))
    assert checked(tokens).startswith(f"checked  3 token shards, {size:,} bytes, by SHA-256 and largest id in ")


@pytest.mark.parametrize("file", ["train_00000.bin", "validation_00000.bin", "test_00000.bin", "meta.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_is_told_in_one_line(tokens, file, damage):
    DAMAGES[damage](tokens / file)
    assert_refused(tokens, r"run (the tokenize stage|dvc repro tokenize)")


def test_swapped_splits_are_refused(tokens):
    for old, new in (("train", "x"), ("test", "train"), ("x", "test")):
        (tokens / f"{old}_00000.bin").rename(tokens / f"{new}_00000.bin")
    assert_refused(tokens, "train has .* tokens where meta.json says")


def test_the_same_tokens_in_another_order_are_refused(tokens):
    data = (tokens / "test_00000.bin").read_bytes()
    (tokens / "test_00000.bin").write_bytes(data[:24] + data[-2:] + data[24:-2])
    assert_refused(tokens, "is not the shard that was written")


def test_an_added_shard_is_refused(tokens):
    shutil.copy(tokens / "train_00000.bin", tokens / "train_00001.bin")
    assert_refused(tokens, r"train_00001.bin: is not named by meta.json")


def test_an_id_beyond_the_vocabulary_is_refused_though_the_digests_are_right(tokens):
    meta = json.loads((tokens / "meta.json").read_text())
    write_shards(tokens, "test", [np.array([0, 1, 257], np.uint16)], np.dtype("<u2"), 10)
    meta["splits"]["test"]["shards"]["test_00000.bin"] = sha256_file(tokens / "test_00000.bin")
    meta["splits"]["test"]["tokens"] = 3
    meta["sha256"] = sha256_lines({k: v for split in meta["splits"].values() for k, v in split["shards"].items()})
    (tokens / "meta.json").write_text(json.dumps(meta))
    assert_refused(tokens, r"test_00000.bin: holds id 257; must be < 257")


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": True},
        {"vocab_size": "257"},
        {"vocab_size": 0},
        {"eos_token_id": 257},
        {"bos_token_id": None},
        {"dtype": "int8"},
        {"dtype": "uint32"},
        {"sha256": "0" * 64},
        {"corpus": []},
        {"splits": {}},
        {"splits": {"train": 3}},
        {"surprise": 1},
    ],
)
def test_a_meta_that_says_something_else_is_refused_in_one_line(tokens, change):
    meta = json.loads((tokens / "meta.json").read_text())
    (tokens / "meta.json").write_text(json.dumps({**meta, **change}))
    assert_refused(tokens, "run the tokenize stage again")


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, "\ud800", "NaN", "9" * 5000])
def test_a_meta_of_another_kind_is_refused_in_one_line(tokens, text):
    (tokens / "meta.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert_refused(tokens, "run the tokenize stage again")

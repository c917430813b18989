import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.shards import HEADER, MAGIC, TokenStream, shard_path, token_dtype, write_shards
from dsv3.errors import UserError

U2 = np.dtype("<u2")


def stream_of(directory, split="train"):
    return TokenStream(sorted(directory.glob(f"{split}_*.bin")))


def written(directory, tokens, shard_tokens=7, dtype=U2, split="train"):
    write_shards(directory, split, [np.asarray(tokens, np.int64).astype(dtype)], dtype, shard_tokens)
    return stream_of(directory, split)


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(0, 65535), max_size=12), max_size=6),
    shard_tokens=st.integers(1, 20),
    start=st.integers(-90, 90) | st.none(),
    stop=st.integers(-90, 90) | st.none(),
)
def test_any_chunks_and_shard_sizes_give_back_the_same_sequence_in_every_span(
    tmp_path_factory, chunks, shard_tokens, start, stop
):
    directory = tmp_path_factory.mktemp("shards")
    tokens = [token for chunk in chunks for token in chunk]
    paths = write_shards(directory, "train", [np.array(chunk, U2) for chunk in chunks], U2, shard_tokens)
    stream = stream_of(directory)
    assert len(stream) == len(tokens)
    assert stream[start:stop].tolist() == tokens[start:stop]
    assert len(paths) == max(1, -(-len(tokens) // shard_tokens))
    assert all(path.stat().st_size <= HEADER.size + 2 * shard_tokens for path in paths)


def test_the_dtype_is_the_narrowest_that_holds_the_vocabulary():
    assert (token_dtype(65536).itemsize, token_dtype(65537).itemsize) == (2, 4)


def test_large_ids_survive_in_four_bytes(tmp_path):
    stream = written(tmp_path, [0, 65536, 2**32 - 1], dtype=np.dtype("<u4"))
    assert stream[:].tolist() == [0, 65536, 2**32 - 1]


def test_a_stream_is_memory_mapped_and_pickles_without_its_tokens(tmp_path):
    stream = written(tmp_path, range(5000), shard_tokens=2000)
    pickled = pickle.dumps(stream)
    assert len(pickled) < 2000
    assert pickle.loads(pickled)[1990:2010].tolist() == list(range(1990, 2010))
    with pytest.raises(ValueError, match="read-only"):
        stream[:10][0] = 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "header promises"),
        (lambda data: data + b"x", "header promises"),
        (lambda data: data[:10], "is no token shard"),
        (lambda data: b"x" + data[1:], "is no token shard"),
        (lambda data: HEADER.pack(MAGIC, 9, 2, 3) + data[HEADER.size :], "must be format 1"),
        (lambda data: HEADER.pack(MAGIC, 1, 3, 3) + data[HEADER.size :], "3 bytes per token"),
    ],
)
def test_a_damaged_shard_is_told_in_one_line(tmp_path, damage, message):
    written(tmp_path, [1, 2, 3])
    path = shard_path(tmp_path, "train", 0)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        stream_of(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_shard_is_told_by_name(tmp_path):
    with pytest.raises(UserError, match=r"test_00000.bin: can't be read"):
        TokenStream([shard_path(tmp_path, "test", 0)])


def test_a_failure_half_way_leaves_no_unfinished_file(tmp_path):
    def chunks():
        yield np.arange(10, dtype=U2)
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        write_shards(tmp_path, "train", chunks(), U2, shard_tokens=8)
    assert [path.name for path in tmp_path.iterdir()] == ["train_00000.bin"]
    assert len(stream_of(tmp_path)) == 8


def test_reading_shards_needs_no_torch():
    code = "import sys, dsv3.data.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

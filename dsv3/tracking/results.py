"""What the stages left in their folders, as the events that trackers are shown: live, and again by `rebuild`."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dsv3.artifacts import read_json
from dsv3.errors import UserError
from dsv3.params.read import read_yaml
from dsv3.tracking.events import Distribution, Event, Figure, Result, Row, Text
from dsv3.tracking.metrics import METRICS, TABLES, Cell

HELDOUT = "heldout"
SAMPLE = re.compile(
    r"^## `(?P<prompt>.*)`(?: \((?P<number>\d+) of \d+\))?\n\n(?P<fence>`{3,})text\n(?P<text>(?s:.*?))\n(?P=fence)$",
    re.MULTILINE,
)
"""One continuation on the page that `sample` writes, whose fences are longer than any run of backticks in the text."""

SPECULATION = re.compile(
    r"^\| speculation \| (?P<accepted>[\d,]+) of (?P<drafted>[\d,]+) drafts accepted.*, "
    r"(?P<tokens_per_pass>[\d.]+) tokens per forward pass \|$",
    re.MULTILINE,
)
"""The counts of drafts in the page's table, with speculative decoding."""


def train_events(folder: Path, step: int) -> Iterator[Event]:
    """Yield the rows and the result of the training in `folder`, which ended at `step`."""
    rows = [Row(table, cells) for table in TABLES for cells in read_table(folder / f"{table}.tsv")]
    yield from in_order(rows)
    yield from _result("train", folder, step)


def evaluate_events(metrics: Path, step: int) -> Iterator[Event]:
    """Yield the result, figures and expert loads of the evaluation whose metrics.json that is."""
    folder = metrics.parent
    yield from _result("evaluate", folder, step)
    for figure in sorted((folder / "figures").glob("*.png")):
        yield Figure(figure.stem, figure, step, {"subset": HELDOUT})
    loads: dict[int, list[float]] = {}
    for row in read_table(folder / "expert_load.tsv"):
        loads.setdefault(int(row["layer"]), []).append(float(row["load"]))
    for layer, heights in loads.items():
        yield Distribution("load", heights, step, {"subset": HELDOUT, "layer": layer})


def sample_events(page: Path, step: int) -> Iterator[Event]:
    """Yield each text of the page that `sample` wrote, and what it says of drafts."""
    if page.is_file():
        text = page.read_text(encoding="utf-8")
        if found := SPECULATION.search(text.partition("\n## ")[0]):
            drafted, accepted = (int(found[name].replace(",", "")) for name in ("drafted", "accepted"))
            acceptance = {"draft_acceptance": accepted / drafted} if drafted else {}
            yield Result("sample", {**acceptance, "tokens_per_pass": float(found["tokens_per_pass"])}, step)
        for match in SAMPLE.finditer(text):
            number = {"number": int(match["number"])} if match["number"] else {}
            yield Text("sample", match["text"], step, {"prompt": match["prompt"], **number})


def valid_events(lock_file: Path, params: Mapping[str, Any], step: int) -> Iterator[Event]:
    """Yield what `evaluate` and `sample` left, where dvc.lock says that it was made from this model and `params`.

    A dvc.lock that can't be read, such as one amid a merge, says nothing; it is DVC's to judge.
    """
    if not lock_file.is_file():
        return
    try:
        found = list(_valid_places(read_yaml(lock_file)["stages"], params))
    except (UserError, LookupError, TypeError, AttributeError):
        return
    for place, events in found:
        yield from events(place, step)


def _valid_places(
    stages: Mapping[str, Any], params: Mapping[str, Any]
) -> Iterator[tuple[Path, Callable[[Path, int], Iterator[Event]]]]:
    """Yield what the later stages have made from the model and `params`, and what reads it."""
    model = {out["path"]: out.get("md5") for out in stages.get("train", {}).get("outs", [])}
    for stage, (name, events) in LATER_STAGES.items():
        entry = stages.get(stage, {})
        made_with = entry.get("params", {}).get("params.yaml", {})
        sources = {dep["path"]: dep.get("md5") for dep in entry.get("deps", []) if dep["path"] in model}
        places = [Path(out["path"]) for out in entry.get("outs", []) if Path(out["path"]).name == name]
        is_valid = all(params.get(section) == value for section, value in made_with.items())
        if is_valid and sources and sources.items() <= model.items():
            yield from ((place, events) for place in places)


def read_table(path: Path) -> list[dict[str, Cell]]:
    """Return the rows of a table that the recorder wrote, without their empty cells; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        try:
            return [
                {name: cell if METRICS[name].is_text else float(cell) for name, cell in row.items() if cell}
                for row in rows
            ]
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            where, reason = f"{path}:{rows.line_num}", f"{type(error).__name__}: {error}"
            raise UserError(f"{where}: is no row of a table ({reason}); dvc checkout brings it back") from None


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Return the rows in the order in which a training writes them: by step, and validations last."""
    return sorted(rows, key=lambda row: (row.cells["step"], row.table == "validation"))


def _result(stage: str, folder: Path, step: int) -> Iterator[Event]:
    if (folder / "metrics.json").is_file():
        yield Result(stage, read_json(folder / "metrics.json"), step)


LATER_STAGES = MappingProxyType(
    {"evaluate": ("metrics.json", evaluate_events), "sample": ("samples.md", sample_events)}
)
"""Stages that add to a training's run: the name of the output to start from, and what reads it."""

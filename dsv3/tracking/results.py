"""What the stages left in their folders, as the events that trackers are shown: live, and again by `rebuild`."""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path

from dsv3.artifacts import REMEDY, read_json, read_regular
from dsv3.errors import UserError
from dsv3.tracking.events import Distribution, Event, Figure, Result, Row, Text, path_name
from dsv3.tracking.metrics import METRICS, TABLES, Cell, renamed

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


def train_events(run: Path, step: int) -> Iterator[Event]:
    """Yield the rows and the result of the training whose run.json that is, which ended at `step`."""
    folder = run.parent
    tables = {name: read_table(folder / f"{name}.tsv", table.index) for name, table in TABLES.items()}
    rows = [Row(name, cells) for name, table in tables.items() for cells in table]
    yield from in_order(rows)
    yield from _result("train", folder, step)


def evaluate_events(metrics: Path, step: int) -> Iterator[Event]:
    """Yield the result, figures and expert loads of the evaluation whose metrics.json that is."""
    folder = metrics.parent
    yield from _result("evaluate", folder, step)
    for figure in sorted((folder / "figures").glob("*.png")):
        yield Figure(figure.stem, figure, step, {"subset": HELDOUT})
    loads: dict[int, list[float]] = {}
    for row in read_table(folder / "expert_load.tsv", ("layer", "load_share")):
        loads.setdefault(int(row["layer"]), []).append(float(row["load_share"]))
    for layer, heights in loads.items():
        yield Distribution("load_share", heights, step, {"subset": HELDOUT, "layer": layer})


def sample_events(page: Path, step: int) -> Iterator[Event]:
    """Yield each text of the page that `sample` wrote, and what it says of drafts."""
    if page.is_file():
        try:
            text = read_regular(page)
        except ValueError as error:
            raise UserError(f"{page}: is not UTF-8 ({error}); {REMEDY}") from None
        if found := SPECULATION.search(text.partition("\n## ")[0]):
            drafted, accepted = (int(found[name].replace(",", "")) for name in ("drafted", "accepted"))
            acceptance = {"draft_acceptance": accepted / drafted} if drafted else {}
            yield Result("sample", {**acceptance, "tokens_per_pass": float(found["tokens_per_pass"])}, step)
        yield from _texts(text, step)


def _texts(page: str, step: int) -> Iterator[Text]:
    """Yield each continuation; its context has the prompt's ordinal where the prompt alone is another's name too.

    So are a prompt that is there twice, two that the page shows alike, and two that begin alike and are cut in a path.
    """
    matches = list(SAMPLE.finditer(page))
    ordinals = list(accumulate(match["number"] in (None, "1") for match in matches))
    paths = {ordinal: _prompt_path(match) for ordinal, match in zip(ordinals, matches, strict=True)}
    occurrences = Counter(paths.values())
    for ordinal, match in zip(ordinals, matches, strict=True):
        context: dict[str, str | int] = {"prompt": match["prompt"]}
        if occurrences[paths[ordinal]] > 1:
            context["prompt_number"] = ordinal
        if match["number"]:
            context["number"] = int(match["number"])
        yield Text("sample", match["text"], step, context)


def _prompt_path(match: re.Match[str]) -> str:
    return path_name("sample", {"prompt": match["prompt"]})


def read_table(path: Path, index: Iterable[str]) -> list[dict[str, Cell]]:
    """Return the rows of a table that the recorder wrote, without their empty cells; none where there is no file.

    Raises `UserError` for anything else, such as a row that lacks one of the `index` columns.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        try:
            table = [
                {name: cell if METRICS[name].is_text else float(cell) for name, cell in renamed(row).items() if cell}
                for row in rows
            ]
            for row in table:
                _check_row(row, index)
        except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
            where, reason = f"{path}:{rows.line_num}", f"{type(error).__name__}: {error}"
            raise UserError(f"{where}: is no row of a table ({reason}); {REMEDY}") from None
    return table


def _check_row(row: Mapping[str, Cell], index: Iterable[str]) -> None:
    """Raise `KeyError`, `ValueError` or `OverflowError` where trackers could not place a row, or draw its shares."""
    for name in index:
        _ = row[name] if METRICS[name].is_text else int(row[name])
    _ = [float(share) for share in str(row.get("load_shares", "")).split()]


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Return the rows in the order in which a training writes them: by step, and validations last."""
    return sorted(rows, key=lambda row: (row.cells["step"], row.table == "validation"))


def _result(stage: str, folder: Path, step: int) -> Iterator[Event]:
    if (folder / "metrics.json").is_file():
        yield Result(stage, read_json(folder / "metrics.json"), step)

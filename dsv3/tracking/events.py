"""What a tracker can be shown: one class per kind, so that a kind is spelled out here and where it is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3.errors import one_line
from dsv3.tracking.metrics import Cell

Context = Mapping[str, str | int]
"""What tells a text, figure or distribution from others of its name."""


@dataclass(frozen=True)
class Row:
    """One row of a table of the training."""

    table: str
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Result:
    """The content of a stage's metrics.json."""

    stage: str
    metrics: Mapping[str, Any]
    step: int


@dataclass(frozen=True)
class Text:
    """A text."""

    name: str
    text: str
    step: int
    context: Context = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """An image file."""

    name: str
    path: Path
    step: int
    context: Context = field(default_factory=dict)

    @property
    def caption(self) -> str:
        """What stands below it."""
        return self.name


@dataclass(frozen=True)
class Distribution:
    """Heights of bins 0, 1, 2 ... (such as the experts' loads)."""

    name: str
    heights: Sequence[float]
    step: int
    context: Context = field(default_factory=dict)


@dataclass(frozen=True)
class Heatmap:
    """Numbers by row and column, which a tracker shows as a picture (`dsv3.tracking.loads.picture`)."""

    name: str
    rows: Sequence[Sequence[float]]
    caption: str
    step: int
    context: Context = field(default_factory=dict)


@dataclass(frozen=True)
class LastLine:
    """What the terminal shows after the run was closed, because the training stopped: for trackers that keep a log."""

    text: str


Event = Row | Result | Text | Figure | Distribution | Heatmap | LastLine


def path_name(name: str, context: Context) -> str:
    """Return `<name>/<value>/...`, for trackers whose names are paths; values are cut to 40 characters of one line."""
    return "/".join([name, *(one_line(value)[:40] for value in context.values())])

"""How a stage shows where it stands: one rewritten line in a terminal, plain lines elsewhere, JSON for programs.

A log file should not hold a thousand states of one bar, and a terminal should not scroll for minutes. What a stage says
once (a validation, say) is a line of its own in both.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Protocol

import typer
from tqdm import tqdm

LINE_S = 15.0
"""Shortest time between two plain lines."""

BAR_DELAY_S = 1.0
"""What is done sooner has no bar, which would stand amid what a library shows meanwhile (the tokenizer's trainer)."""

Values = Mapping[str, float | str]
"""What stands beside the count: name -> number, or a word."""


def text_of(value: float | str) -> str:
    """Return a number as a person reads it: four digits, or all of a large one."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class ProgressMode(StrEnum):
    """How progress is shown."""

    auto = "auto"
    bar = "bar"
    lines = "lines"
    json = "json"
    none = "none"


ProgressOption = Annotated[
    ProgressMode,
    typer.Option(
        "--progress",
        help="bar: one line, rewritten; lines: plain lines; json: a JSON object per line; auto: bar in a terminal, "
        "else lines.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress: the same as --progress none.")]


class Progress(Protocol):
    """Where a stage stands."""

    def update(self, done: int, values: Values) -> None:
        """Show that `done` of the total are done, with `values` beside it."""
        ...

    def note(self, line: str, values: Values) -> None:
        """Show a line once; programs get `values` instead of the text."""
        ...


class NoProgress:
    """Shows nothing."""

    def update(self, done: int, values: Values) -> None:
        """Do nothing."""

    def note(self, line: str, values: Values) -> None:
        """Do nothing."""


class Bar:
    """One line of a terminal, rewritten in place by tqdm."""

    def __init__(self, name: str, total: int, unit: str, done: int) -> None:
        layout = "{desc} {percentage:3.0f}% {n_fmt}/{total_fmt}, {remaining} left{postfix}"
        self._bar = tqdm(
            desc=name, total=total, initial=done, unit=unit, bar_format=layout, dynamic_ncols=True, delay=BAR_DELAY_S
        )

    def update(self, done: int, values: Values) -> None:
        """Rewrite the line."""
        self._bar.set_postfix_str(
            ", ".join(f"{name} {text_of(value)}" for name, value in values.items()), refresh=False
        )
        self._bar.update(done - self._bar.n)

    def note(self, line: str, values: Values) -> None:
        """Print the line above the bar."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._bar.close()


class Lines:
    """Plain lines on stderr: at most one every `LINE_S`, and one at the end."""

    def __init__(
        self, name: str, total: int, unit: str, done: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._total, self._unit, self._clock = name, total, unit, clock
        self._first_done, self._started_at = done, clock()
        self._shown_at = self._started_at

    def update(self, done: int, values: Values) -> None:
        """Print a line if the last one is old enough, or if everything is done."""
        now = self._clock()
        if now - self._shown_at < LINE_S and done < self._total:
            return
        self._shown_at = now
        elapsed_s = now - self._started_at
        remaining_s = elapsed_s * (self._total - done) / max(1, done - self._first_done)
        shown = "".join(f", {name} {text_of(value)}" for name, value in values.items())
        count = f"{self._unit} {done:,} of {self._total:,}, {tqdm.format_interval(remaining_s)} left"
        self.note(f"{self._name}: {count}{shown}", {})

    def note(self, line: str, values: Values) -> None:
        """Print the line."""
        typer.echo(line, err=True)


class JsonLines:
    """One JSON object per state on stdout, for programs; a note carries its values."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self._fixed = {"stage": name, "total": total, "unit": unit}

    def update(self, done: int, values: Values) -> None:
        """Print the state."""
        typer.echo(json.dumps({**self._fixed, "done": done, **values}))

    def note(self, line: str, values: Values) -> None:
        """Print the values."""
        typer.echo(json.dumps({**self._fixed, **values}))


@contextmanager
def shown_progress(mode: ProgressMode, name: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Yield the display of `total` units, of which `done` are done."""
    if mode is ProgressMode.auto:
        mode = ProgressMode.bar if sys.stderr.isatty() else ProgressMode.lines
    if mode is ProgressMode.bar:
        bar = Bar(name, total, unit, done)
        try:
            yield bar
        finally:
            bar.close()
    elif mode is ProgressMode.lines:
        yield Lines(name, total, unit, done)
    elif mode is ProgressMode.json:
        yield JsonLines(name, total, unit)
    else:
        yield NoProgress()


def counted(progress: Progress) -> Callable[[int], None]:
    """Return a function of further units that shows how many there are so far."""
    done = 0

    def add(units: int) -> None:
        nonlocal done
        done += units
        progress.update(done, {})

    return add

"""What a tracker must be able to do, and the wrapper that keeps its failures away from the training."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dsv3.tracking.identity import RunIdentity
from dsv3.tracking.metrics import Cell

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """A view of the run. Any method may raise; `IsolatedSink` catches."""

    name: str
    resumed: bool
    """Whether `open` found the run of the hash that it was given, with the rows it already held."""

    def open(self, identity: RunIdentity, run_hash: str | None, is_owner: bool) -> str | None:
        """Create the run, or re-open the one of `run_hash`; return its hash if this tracker gives hashes.

        `is_owner` is True for the training, which names the run, and False for stages that only add to it.
        """
        ...

    def log(self, table: str, row: Mapping[str, Cell]) -> None:
        """Show one row of a table."""
        ...

    def result(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        """Show a stage's metrics.json."""
        ...

    def text(self, name: str, text: str, step: int, context: Mapping[str, Any]) -> None:
        """Show a text."""
        ...

    def figure(self, name: str, path: Path, step: int, context: Mapping[str, Any]) -> None:
        """Show an image file."""
        ...

    def distribution(self, name: str, values: Sequence[float], step: int, context: Mapping[str, Any]) -> None:
        """Show heights of bins 0, 1, 2 ..."""
        ...

    def close(self, status: str) -> None:
        """End the run's recording: finished, interrupted or failed."""
        ...


class IsolatedSink:
    """A sink whose failures are told once and never reach the caller; one that can't be opened is left alone."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._has_failed = False
        self._is_open = False

    @property
    def resumed(self) -> bool:
        """Whether the run was there already with its rows."""
        return self._sink.resumed

    def open(self, identity: RunIdentity, run_hash: str | None, is_owner: bool) -> str | None:
        """Open the sink; return its run's hash, or None where it has none or can't be opened."""
        self._is_open = True
        opened = self._call(self._sink.open, identity, run_hash, is_owner)
        self._is_open = not self._has_failed
        return opened

    def log(self, table: str, row: Mapping[str, Cell]) -> None:
        """Forward a row."""
        self._call(self._sink.log, table, row)

    def result(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        """Forward a stage's metrics."""
        self._call(self._sink.result, stage, metrics, step)

    def text(self, name: str, text: str, step: int, context: Mapping[str, Any]) -> None:
        """Forward a text."""
        self._call(self._sink.text, name, text, step, context)

    def figure(self, name: str, path: Path, step: int, context: Mapping[str, Any]) -> None:
        """Forward an image."""
        self._call(self._sink.figure, name, path, step, context)

    def distribution(self, name: str, values: Sequence[float], step: int, context: Mapping[str, Any]) -> None:
        """Forward a distribution."""
        self._call(self._sink.distribution, name, values, step, context)

    def close(self, status: str) -> None:
        """Close the sink."""
        self._call(self._sink.close, status)
        self._is_open = False

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        if not self._is_open:
            return None
        try:
            return method(*arguments)
        # A tracker is a view: whatever is wrong with it (a full disk, a dead server, a locked database) must not cost
        # a training.
        except Exception as error:
            if not self._has_failed:
                logger.warning(
                    "%s failed (%s: %s); the run goes on, results/ stay whole", self._sink.name, _kind(error), error
                )
            self._has_failed = True
            return None


def _kind(error: Exception) -> str:
    return type(error).__name__

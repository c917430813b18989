"""What a tracker must be able to do, where each one is found, and how its failures are kept from the training.

A tracker has one name: in `runtime.trackers`, of its module in this folder, and of the package that it needs.
"""

import gc
import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Literal, Protocol, TypeVar, get_args

from dsv3.cli import skip_shutdown
from dsv3.errors import one_line
from dsv3.params.runtime import RuntimeParams, TrackerName
from dsv3.tracking.events import Event, Row
from dsv3.tracking.identity import RunIdentity
from dsv3.tracking.loads import ExpertLoads
from dsv3.tracking.metrics import WHOLE_MODEL

logger = logging.getLogger(__name__)

T = TypeVar("T")

CALL_S = 20.0
"""Longest wait for a tracker: a server that is gone, or a full disk, can keep it for ever."""
OPEN_S: dict[TrackerName, float] = {"aim": 20.0}
"""The same while it opens a run. Aim tries a full disk for ever; 16 that open one repository at once take 4 s."""
SLOW_OPEN_S = 60.0
"""The same for those that end such a wait themselves: a server may be far away."""

_left_open: list[Any] = []
"""Trackers that have failed, and the errors, which know what was being opened: to collect them would close them."""

Mode = Literal["train", "add", "rebuild"]
"""Who opens a run: the training, a later stage that adds to it, or the command that writes all of it again."""


class Tracker(Protocol):
    """A view of the run. Any method may raise; `IsolatedTracker` catches."""

    has_rows: bool
    """Whether `open` found the run with its rows, which must not be shown again."""

    def open(self, identity: RunIdentity, run_hash: str | None, mode: Mode) -> str | None:
        """Create the run, or re-open the one of `run_hash`; return its hash if this tracker gives hashes."""
        ...

    def write(self, event: Event) -> None:
        """Show one event."""
        ...

    def close(self, status: str) -> None:
        """End the run's recording: finished, interrupted or failed."""
        ...


def load_tracker(name: TrackerName, runtime: RuntimeParams) -> Tracker:
    """Return the tracker of that name, made by `tracker(runtime)` of its module; raise what its package raises."""
    tracker = WithLoads(importlib.import_module(f"dsv3.tracking.{name}").tracker(runtime))
    return tracker if runtime.track_fp8_operands else WithoutOperands(tracker)


class ThroughTracker:
    """A tracker that hands everything on to another one."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self.has_rows = False

    def open(self, identity: RunIdentity, run_hash: str | None, mode: Mode) -> str | None:
        """Open the tracker."""
        opened = self._tracker.open(identity, run_hash, mode)
        self.has_rows = self._tracker.has_rows
        return opened

    def write(self, event: Event) -> None:
        """Show the event."""
        self._tracker.write(event)

    def close(self, status: str) -> None:
        """Close the tracker."""
        self._tracker.close(status)


class WithoutOperands(ThroughTracker):
    """A tracker that is shown what FP8 does to the whole model, and not to each operand: that is hundreds of curves."""

    def write(self, event: Event) -> None:
        """Show the event unless it is a row of one module's operand."""
        if not (isinstance(event, Row) and event.cells.get("module", WHOLE_MODEL) != WHOLE_MODEL):
            super().write(event)


class WithLoads(ThroughTracker):
    """A tracker that is shown the experts' loads, too, which follow from the rows."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__(tracker)
        self._loads = ExpertLoads()

    def write(self, event: Event) -> None:
        """Show the event, and what follows from it."""
        super().write(event)
        if isinstance(event, Row):
            for following in self._loads.events(event):
                super().write(following)


def remedy(name: TrackerName) -> str:
    """Return how a tracker's package is installed, or done without."""
    if name == "aim" and sys.version_info >= (3, 13):
        return "it has no wheels for Python 3.13 and later: set runtime.trackers to [tensorboard], or use Python 3.12"
    return f"pip install -c constraints.txt {name}, or take {name} from runtime.trackers in params.yaml"


class IsolatedTracker:
    """A tracker whose failures are logged once and never reach the caller; one that can't be opened is left alone.

    All its calls run in one thread of its own, so that one which never returns, as on a full disk or with a server that
    is gone, costs the caller a bounded time, once.
    """

    def __init__(self, name: TrackerName, load: Callable[[], Tracker]) -> None:
        self._name: TrackerName = name
        self._load = load
        self._tracker: Tracker | None = None
        self._has_failed = False
        self._calls = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    @property
    def has_rows(self) -> bool:
        """Whether the run was there already with its rows."""
        return self._tracker is not None and self._tracker.has_rows

    def open(self, identity: RunIdentity, run_hash: str | None, mode: Mode) -> str | None:
        """Import the tracker and open it; return its run's hash, or None where it has none or can't be opened."""
        tracker = self._attempt(self._load, None)
        if tracker is None:
            return None
        self._tracker = tracker
        opened = self._attempt(lambda: tracker.open(identity, run_hash, mode), OPEN_S.get(self._name, SLOW_OPEN_S))
        if self._has_failed:
            self._tracker = None
        return opened

    def write(self, event: Event) -> None:
        """Show the event."""
        if tracker := self._tracker:
            self._attempt(lambda: tracker.write(event), CALL_S)

    def close(self, status: str) -> None:
        """Close the tracker."""
        if self._tracker is not None:
            self._attempt(lambda: self._close_and_release(status), CALL_S)
        self._calls.shutdown(wait=False)

    def _close_and_release(self, status: str) -> None:
        """Close the tracker and let go of it in its own thread: what it holds flushes to the disk when it is freed."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.close(status)
        del tracker
        gc.collect()

    def _attempt(self, action: Callable[[], T], limit_s: float | None) -> T | None:
        """Return what `action` returns, or None where it fails; leave a tracker alone that does not answer in time."""
        call = self._calls.submit(action)
        wait([call], limit_s)
        if not call.done():
            self._fail(TimeoutError(f"no answer within {limit_s:g} s"))
            self._tracker = None
            return None
        # A tracker is a view: whatever is wrong with it (a full disk, a dead server, a locked database, a broken
        # installation) must not cost a training. Nor may it end the process: some libraries call sys.exit.
        if error := call.exception():
            self._fail(error)
            return None
        return call.result()

    def _fail(self, error: BaseException) -> None:
        """Log the first failure; see that nothing closes what the tracker has left: Aim tries a full disk for ever."""
        _left_open.append((self._tracker, error))
        if not self._has_failed:
            self._report(error)
        self._has_failed = True
        skip_shutdown()

    def _report(self, error: BaseException) -> None:
        """Log one line."""
        reason = one_line(f"{type(error).__name__}: {error}")
        hint = f"{remedy(self._name)}; " if isinstance(error, ImportError) else ""
        logger.warning(
            "tracker %s failed (%s); %sthe run goes on, results/ are complete, and "
            "python -m dsv3.tracking.rebuild --tracker %s shows them later",
            self._name,
            reason,
            hint,
            self._name,
        )


class OpenTrackers:
    """The trackers of one run, opened; each is isolated from the failures of the others."""

    def __init__(
        self, trackers: Sequence[IsolatedTracker], identity: RunIdentity, run_hash: str | None, mode: Mode
    ) -> None:
        self._trackers = trackers
        self.run_hash = run_hash
        """Hash that the first tracker which gives one gave; those after it file the run under it."""
        for tracker in trackers:
            self.run_hash = tracker.open(identity, self.run_hash, mode) or self.run_hash

    def write(self, event: Event) -> None:
        """Show the event in every tracker."""
        for tracker in self._trackers:
            tracker.write(event)

    def write_missing(self, events: Iterable[Event]) -> None:
        """Show the events in the trackers that don't have the run's rows."""
        lacking = [tracker for tracker in self._trackers if not tracker.has_rows]
        for event in events:
            for tracker in lacking:
                tracker.write(event)

    def close(self, status: str) -> None:
        """Close every tracker; `status` is finished, interrupted or failed."""
        for tracker in self._trackers:
            tracker.close(status)


def open_trackers(runtime: RuntimeParams, identity: RunIdentity, run_hash: str | None, mode: Mode) -> OpenTrackers:
    """Open the trackers named in runtime.trackers, Aim first, for its hash names the run in the others."""
    names: tuple[TrackerName, ...] = get_args(TrackerName)
    named = [IsolatedTracker(name, partial(load_tracker, name, runtime)) for name in names if name in runtime.trackers]
    return OpenTrackers(named, identity, run_hash, mode)

"""Aim: where runs are compared.

Facts that shape this module. A repository must be initialized once: of several processes that find none, all but one
crash, hence the file lock. A training's hash is given by Aim and stored with the results; every later stage, and a
clone that never saw the run, opens the run of a hash that it knows, so a run whose container is missing is made under
that hash. Values are keyed by their step, so writing a step twice overwrites it, and a resumed training needs no care.
Values are read back through an index that only `aim up` may write: nothing here reads them. Aim sets a run's end when
it is closed, whatever happened; so the status is a tag too, where it did not finish, and a later stage keeps the end.
Aim's log of the terminal begins when a run is opened and ends when it is closed, so what the terminal shows before
(the plan) and after (why a training stopped) is appended to it. Its page shows a log as HTML, so these lines, which
hold what users chose, are escaped.
"""

import atexit
import html
import logging
import os
import subprocess
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import aim
import aim.sdk.run
import aim.storage.structured.db
from aim.ext.cleanup import AutoClean
from aim.ext.resource.log import LogLine
from aim.ext.resource.tracker import ResourceTracker
from aim.storage.migrations.utils import create_migration_cmd
from filelock import FileLock

from dsv3.cli import skip_shutdown
from dsv3.errors import one_line
from dsv3.params.runtime import RuntimeParams
from dsv3.tracking.events import Distribution, Event, Figure, Heatmap, LastLine, Result, Row, Text
from dsv3.tracking.identity import RunIdentity, aim_folder, project_root
from dsv3.tracking.loads import picture
from dsv3.tracking.metrics import TABLES, numbers, place
from dsv3.tracking.stages import charted
from dsv3.tracking.tracker import Mode

logger = logging.getLogger(__name__)

SYSTEM_TRACKING_INTERVAL_S = 10
INITIALIZATION_S = 15
"""Longest wait for another process that initializes the repository."""

ENDS: frozenset[str] = frozenset({"interrupted", "failed"})
"""Ends that are tags of the run until it finishes."""

SHOWN_TAGS = 6
"""Most changed parameters that are tags; the description has all."""

logging.getLogger("aim").setLevel(logging.WARNING)  # it reports its threads at INFO
# At the end of the process Aim closes what is open, in a thread, which Python can't start there since version 3.12:
# each stage ended with a traceback, and nothing was closed. The same without a thread.
AutoClean._registered_with_atexit = True
atexit.register(AutoClean._cleanup)


def report_ended_thread(ended: threading.ExceptHookArgs, others: Callable[..., Any] = threading.excepthook) -> None:
    """Log in one line why a thread of Aim's has ended, as they do on a full disk; `others` reports other threads."""
    frames = traceback.walk_tb(ended.exc_traceback)
    if not any(frame.f_globals.get("__name__", "").startswith("aim.") for frame, _ in frames):
        others(ended)
        return
    reason = one_line(f"{ended.exc_type.__name__}: {ended.exc_value}")
    logger.warning("tracker aim: what records terminal and machine has ended (%s); the run goes on", reason)
    skip_shutdown()


threading.excepthook = report_ended_thread


def upgrade_database(url: str) -> None:
    """Make a repository's tables, as Aim does, by a process whose traceback is not shown: its last line says why."""
    environment = os.environ | {"AIM_RUN_META_DATA_DB_URL": url}
    ended = subprocess.run(create_migration_cmd(), env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        errors = [line for line in ended.stderr.splitlines() if "Error: " in line and not line.startswith(" ")]
        raise OSError(f"no tables: {errors[-1] if errors else f'exit status {ended.returncode}'}")


aim.storage.structured.db.upgrade_database = upgrade_database


class Arrivals:
    """What the terminal was given since the last look. Who writes never waits: Aim's thread may, for ever."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()

    def write(self, data: bytes) -> None:
        """Append `data`."""
        self._pieces.append(data)

    def take(self) -> bytes:
        """Return what was written, once."""
        return b"".join(self._pieces.popleft() for _ in range(len(self._pieces)))


class WholeLines(ResourceTracker):
    """Aim's record of machine and terminal, in which writers do not touch the buffer that a thread empties.

    In Aim they do, and what is written meanwhile lands before the beginning of a line that the thread puts back.
    `print` writes a line and its end in two pieces, so now and then a line got another's end.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.arrivals = Arrivals()

    def start(self) -> None:
        """Begin, with the terminal's writers sent to `arrivals`."""
        super().start()
        if id(self) in self._buffer_registry:
            self._buffer_registry[id(self)] = self.arrivals

    def _store_buffered_logs(self) -> None:
        self._io_buffer.write(self.arrivals.take())
        super()._store_buffered_logs()


aim.sdk.run.ResourceTracker = WholeLines


def tracker(runtime: RuntimeParams) -> "AimTracker":
    """Return the tracker of the repository that `runtime.aim_repo` names."""
    return AimTracker(runtime.aim_repo)


class AimTracker:
    """Shows a run in the Aim repository `repo`: a folder, `aim://host:port`, or None for the project's own."""

    def __init__(self, repo: str | None) -> None:
        self._location = repo or str(project_root())
        self.has_rows = False

    def open(self, identity: RunIdentity, run_hash: str | None, mode: Mode) -> str | None:
        """Create or re-open the run; return its hash."""
        initialize(self._location)
        # Terminal and machine are recorded where the process is ours alone, i.e. a training that DVC started.
        self._is_watched = mode == "train" and "DVC_STAGE" in os.environ
        self._repo = aim.Repo.from_path(self._location)
        self._end_time: float | None = None
        self._last_line = ""
        if self._is_watched and identity.plan_summary:
            run_hash = self._append_to_log(run_hash, identity.plan_summary)
        self._run = self._open_run(run_hash, self._is_watched)
        is_known = self._run.get("params") is not None
        self.has_rows = is_known and mode != "rebuild"  # writing rows again overwrites them, so a rebuild may
        self._keeps_end = mode != "train" and self._end_time is not None
        if mode == "train":
            self._run["status"] = "running"
        self._describe(identity)
        return self._run.hash

    def _open_run(self, run_hash: str | None, is_watched: bool) -> aim.Run:
        """Open the run of that hash, or a new one, with a record of terminal and machine or without; return it."""
        if run_hash is not None:
            self._end_time = self._stored(run_hash).get("end_time")  # makes the run's container where it is missing
            listed: Any = aim.Repo._all_run_hashes  # Aim keeps the list for half a second, in which the run is unknown
            listed.cache_clear()
        options: dict[str, Any] = {
            "log_system_params": False,  # it needs pkg_resources, and stores the environment's variables
            "capture_terminal_logs": is_watched,
            "system_tracking_interval": SYSTEM_TRACKING_INTERVAL_S if is_watched else None,
        }
        return aim.Run(run_hash, repo=self._repo, **options)

    def _append_to_log(self, run_hash: str | None, text: str) -> str:
        """Append lines to the log of a run that is not open; return its hash, a new one for None."""
        run = self._open_run(run_hash, is_watched=False)
        logs: Any = run.get_terminal_logs()
        first = logs.last_step() + 1 if logs else 0
        for step, line in enumerate(text.splitlines(), start=first):
            run.track(LogLine(html.escape(line, quote=False)), name="logs", step=step)
        run.close()
        return run.hash

    def _stored(self, run_hash: str) -> Any:
        """Return the tree of what is stored about a run."""
        return self._repo.request_tree("meta", run_hash, read_only=False).subtree(("meta", "chunks", run_hash))

    def _describe(self, identity: RunIdentity) -> None:
        self._run.name = identity.title
        self._run.description = ", ".join(identity.change_tags) or "parameters of the baseline commit"
        self._run.experiment = identity.experiment
        self._set_tags({*identity.tags, *identity.change_tags[:SHOWN_TAGS]}, remove=set())
        for name, values in identity.facts.items():
            self._run[name] = values

    def write(self, event: Event) -> None:
        """Track the event."""
        match event:
            case Row():
                self._write_row(event)
            case Result(stage, metrics, step):
                self._run[stage] = dict(metrics)  # for queries
                for subset, name, value in charted(stage, metrics):
                    self._track(value, name, step, {"subset": subset, "stage": stage})
            case Text(name, text, step, context):
                self._track(aim.Text(text), name, step, context)
            case Figure() | Heatmap():
                self._track(aim.Image(picture(event), caption=event.caption), event.name, event.step, event.context)
            case Distribution(name, heights, step, context):
                bins = aim.Distribution(hist=list(heights), bin_range=(0, len(heights)))
                self._track(bins, name, step, context)
            case LastLine(text):
                self._last_line = text

    def _write_row(self, row: Row) -> None:
        """Track the row's numbers with the table's `subset`, and the row's layer, or module and operand."""
        table, cells = TABLES[row.table], row.cells
        context: dict[str, Any] = {"subset": table.subset, **place(row.table, cells)}
        epoch = int(cells["epoch"]) if "epoch" in cells else None
        for name in numbers(row.table, cells):
            # always a float: an int followed by a float changes the type of the sequence
            self._track(float(cells[name]), name, int(cells["step"]), context, epoch)

    def close(self, status: str) -> None:
        """Note how the run ended and release it."""
        self._run["status"] = status
        self._set_tags(ENDS & {status}, remove=ENDS - {status})
        if status == "finished":
            self._run.report_successful_finish()
        run_hash = self._run.hash
        self._run.close()
        if self._is_watched and self._last_line:
            self._append_to_log(run_hash, self._last_line)
        if self._keeps_end:
            self._stored(run_hash)["end_time"] = self._end_time

    def _set_tags(self, add: AbstractSet[str], remove: AbstractSet[str]) -> None:
        tags = set(self._run.tags)
        for tag in sorted(add - tags):
            self._run.add_tag(tag)
        for tag in sorted(remove & tags):
            self._run.remove_tag(tag)

    def _track(self, value: Any, name: str, step: int, context: Mapping[str, Any], epoch: int | None = None) -> None:
        options: dict[str, Any] = {"epoch": epoch, "context": dict(context)}  # Aim's annotations are narrower than Aim
        self._run.track(value, name=name, step=step, **options)


def initialize(location: str) -> None:
    """Create the Aim repository in the folder `location` unless it is there; one process at a time."""
    repository = aim_folder(location)
    if repository is None:
        return
    folder = repository.parent
    is_complete = (repository / "VERSION").is_file  # what Aim writes last
    if is_complete():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".aim.lock"
    with FileLock(lock, timeout=INITIALIZATION_S):
        if not is_complete():
            aim.Repo.from_path(str(folder), init=True)
    lock.unlink(missing_ok=True)  # whoever still waits on it finds the repository complete

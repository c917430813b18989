"""Aim: where runs are compared.

Facts that shape this module. A repository must be initialised once: of several processes that find none, all but one
crash, hence the file lock. A new run's hash can't be chosen, so it is stored with the results, and stages that follow
re-open the run by it; in a clone that never saw the run, a new one is begun that says which run it stands for. Values
are keyed by their step, so tracking a step twice overwrites it, and a resumed training needs no care. Values are read
back through an index that only `aim up` may write: nothing here reads.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aim import Distribution, Image, Repo, Run, Text
from aim.sdk.errors import MissingRunError
from filelock import FileLock

from dsv3.tracking.identity import RunIdentity, project_root
from dsv3.tracking.metrics import TABLES, Cell, place, scores

SYSTEM_TRACKING_INTERVAL_S = 10
INITIALISATION_S = 120
"""Longest wait for another process that initialises the repository."""

logging.getLogger("aim").setLevel(logging.WARNING)  # it tells of its threads at INFO


class AimSink:
    """Shows a run in the Aim repository `repo`: a folder, `aim://host:port`, or None for the project's own."""

    name = "Aim"

    def __init__(self, repo: str | None) -> None:
        self._location = repo or str(project_root())
        self.resumed = False

    def open(self, identity: RunIdentity, run_hash: str | None, is_owner: bool) -> str | None:
        """Create or re-open the run; return its hash."""
        initialise(self._location)
        # Terminal and machine are recorded where the process is ours alone, i.e. a training that DVC started.
        is_watched = is_owner and "DVC_STAGE" in os.environ
        options: dict[str, Any] = {
            "repo": self._location,
            "log_system_params": False,  # it needs pkg_resources, and stores the environment's variables
            "capture_terminal_logs": is_watched,
            "system_tracking_interval": SYSTEM_TRACKING_INTERVAL_S if is_watched else None,
        }
        try:
            self._run = Run(run_hash, **options)
            self.resumed = run_hash is not None
        except MissingRunError:
            self._run = Run(**options)
            self._run["source_run"] = run_hash
        if is_owner or not self.resumed:
            self._describe(identity)
        return self._run.hash

    def _describe(self, identity: RunIdentity) -> None:
        self._run.name = identity.name
        self._run.experiment = identity.experiment
        for tag in identity.tags:
            if tag not in self._run.tags:
                self._run.add_tag(tag)
        self._run["params"] = identity.params
        self._run["architecture"] = identity.architecture
        self._run["dvc"] = identity.dvc
        self._run["env"] = identity.env
        self._run["size"] = identity.size

    def log(self, table: str, row: Mapping[str, Cell]) -> None:
        """Track the row's numbers with the table's `subset`, and the row's layer, or module and operand."""
        context: dict[str, Any] = {"subset": TABLES[table].subset, **place(table, row)}
        epoch = int(row["epoch"]) if "epoch" in row else None
        for name, value in row.items():
            if name not in TABLES[table].index:
                # always a float: an int followed by a float changes the type of the sequence
                self._track(float(value), name, int(row["step"]), context, epoch)

    def result(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        """Store the metrics as run[stage], for queries, and the scores of splits as metrics, for charts."""
        self._run[stage] = dict(metrics)
        for subset, name, value in scores(stage, metrics):
            self._track(float(value), name, step, {"subset": subset, "stage": stage})

    def text(self, name: str, text: str, step: int, context: Mapping[str, Any]) -> None:
        """Track a text."""
        self._track(Text(text), name, step, context)

    def figure(self, name: str, path: Path, step: int, context: Mapping[str, Any]) -> None:
        """Track an image file."""
        self._track(Image(str(path), caption=name), name, step, context)

    def distribution(self, name: str, values: Sequence[float], step: int, context: Mapping[str, Any]) -> None:
        """Track bin heights as a distribution over 0 ... len(values)."""
        bins = Distribution(hist=list(values), bin_range=(0, len(values)))
        self._track(bins, name, step, context)

    def _track(self, value: Any, name: str, step: int, context: Mapping[str, Any], epoch: int | None = None) -> None:
        options: dict[str, Any] = {"epoch": epoch, "context": dict(context)}  # Aim's annotations are narrower than Aim
        self._run.track(value, name=name, step=step, **options)

    def close(self, status: str) -> None:
        """Note how the run ended and release it."""
        self._run["status"] = status
        if status == "finished":
            self._run.report_successful_finish()
        self._run.close()


def initialise(location: str) -> None:
    """Create the Aim repository in the folder `location` unless it is there; one process at a time."""
    if location.startswith(("aim://", "ssh://")):
        return
    folder = Path(location).expanduser()
    folder = folder.parent if folder.name == ".aim" else folder
    is_complete = (folder / ".aim" / "VERSION").is_file  # what Aim writes last
    if is_complete():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".aim.lock"
    with FileLock(lock, timeout=INITIALISATION_S):
        if not is_complete():
            Repo.from_path(str(folder), init=True)
    lock.unlink(missing_ok=True)  # whoever still waits on it finds the repository complete

"""The one place through which a run's numbers leave the program.

The truth is a folder of tab-separated files, which DVC versions and plots; the trackers (Aim, TensorBoard, W&B,
trackio) are views, shown the same rows, whose failure costs nothing. A row is on the disk when `log` returns, so a
killed run keeps its history; a resumed run gets its rows from the checkpoint, and rewrites the files up to that step
(DVC deletes a stage's outputs before it runs). The alternative, a tracker as the truth, would tie every number to a
database that a clone of the repository does not have.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dsv3.artifacts import REMEDY, read_model, reporting_full_disk, write_text
from dsv3.errors import UserError
from dsv3.params.read import Params
from dsv3.params.runtime import RuntimeParams
from dsv3.tracking.events import Event, Result, Row
from dsv3.tracking.identity import RunIdentity, later_identity, native
from dsv3.tracking.metrics import METRICS, TABLES, Cell, names_of, renamed, unknown_names
from dsv3.tracking.results import in_order, train_events
from dsv3.tracking.revision import applied_experiment
from dsv3.tracking.stages import made_with, training_record, valid_events
from dsv3.tracking.tracker import OpenTrackers, open_trackers

Cells = dict[str, Cell]

logger = logging.getLogger(__name__)


class RecordedVersion(BaseModel):
    """What later stages and reports take from section `dvc` of a run.json."""

    model_config = ConfigDict(extra="allow", strict=True)

    git_sha: str | None = None
    git_dirty: bool | None = None


class Record(BaseModel):
    """The content of a run.json; what else it holds is kept."""

    model_config = ConfigDict(extra="allow", strict=True)

    aim_run_hash: str | None
    name: str
    experiment: str
    tags: list[str]
    fingerprint: str | None
    step: int
    dvc: RecordedVersion
    env: dict[str, Any]
    size: dict[str, Any]
    params: dict[str, Any]
    architecture: dict[str, Any] = {}
    changes: dict[str, Any] = {}


class Recorder:
    """Writes the tables of one training into `directory` and shows every row in `trackers`."""

    def __init__(self, directory: Path, identity: RunIdentity, trackers: OpenTrackers, aim_repo: str = ".aim") -> None:
        self._directory = directory
        self._identity = identity
        self._rows: dict[str, list[Cells]] = {table: [] for table in TABLES}
        self._columns: dict[str, list[str]] = {table: [] for table in TABLES}
        self._trackers = trackers
        self._aim_repo = aim_repo
        self.write_tables()

    @property
    def run_hash(self) -> str | None:
        """Hash of the Aim run; None without Aim. Keep it in checkpoints."""
        return self._trackers.run_hash

    def log(self, table: str, row: Mapping[str, Cell]) -> None:
        """Append `row` to `<table>.tsv` and show it in the trackers. Numbers of any kind are stored as Python's."""
        assert table in TABLES, f"{table} is no table; known: {', '.join(TABLES)}"
        check_names(row)
        assert all(name in row for name in TABLES[table].index), f"{table} needs {', '.join(TABLES[table].index)}"
        cells: Cells = native(dict(row))
        self._rows[table].append(cells)
        self._append(table, cells)
        self.show(Row(table, cells))

    def show(self, event: Event) -> None:
        """Show an event in the trackers."""
        self._trackers.write(event)

    def state(self) -> dict[str, list[Cells]]:
        """Return all rows so far, for a checkpoint."""
        return {table: [dict(row) for row in rows] for table, rows in self._rows.items()}

    def restore(self, state: Mapping[str, Sequence[Mapping[str, Cell]]]) -> None:
        """Replace all rows by a checkpoint's and rewrite the files; a tracker that lacks them is shown them again."""
        self._rows = {table: [renamed(row) for row in state.get(table, [])] for table in TABLES}
        self.write_tables()
        self._trackers.write_missing(in_order(Row(table, row) for table, rows in self._rows.items() for row in rows))

    def run_record(self) -> dict[str, Any]:
        """Return what run.json holds: where Aim has the run, and what is needed to build it again from results/."""
        return record_of(self._identity, self.run_hash, self._aim_repo, self._last_step())

    def close(self, status: str) -> None:
        """End the recording; `status` is finished, interrupted or failed."""
        self._trackers.close(status)

    def _last_step(self) -> int:
        """Return the last step of any table; where evaluations of the finished model stand in charts."""
        return max((int(row["step"]) for rows in self._rows.values() for row in rows), default=0)

    def _append(self, table: str, row: Cells) -> None:
        if not set(row) <= set(self._columns[table]) or not self._path(table).is_file():
            self._write_table(table)
            return
        path = self._path(table)
        with reporting_full_disk(path), path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(_line(row, self._columns[table]))

    def write_tables(self) -> None:
        """Write every table whole."""
        for table in TABLES:
            self._write_table(table)

    def _write_table(self, table: str) -> None:
        rows = self._rows[table]
        names = {name for row in rows for name in row} | set(TABLES[table].index)
        self._columns[table] = [name for name in METRICS if name in names]
        header = "\t".join(self._columns[table]) + "\n"
        write_text(self._path(table), header + "".join(_line(row, self._columns[table]) for row in rows))

    def _path(self, table: str) -> Path:
        return self._directory / f"{table}.tsv"


def check_names(names: Iterable[str]) -> None:
    """Refuse what is not in the vocabulary, a mistake of the program's."""
    unknown = unknown_names(names)
    assert not unknown, f"not in dsv3/tracking/metrics.py: {', '.join(unknown)}"


def _line(row: Mapping[str, Cell], columns: Sequence[str]) -> str:
    """Return one line of a table; nine significant digits give a float32 back exactly."""
    cells = (row.get(name, "") for name in columns)
    return "\t".join(f"{cell:.9g}" if isinstance(cell, float) else str(cell) for cell in cells) + "\n"


def open_recorder(
    directory: Path, runtime: RuntimeParams, identity: RunIdentity, run_hash: str | None = None
) -> Recorder:
    """Return the recorder of a training, for its main process only; `run_hash` comes from the checkpoint, if any."""
    trackers = open_trackers(runtime, identity, run_hash, "train")
    try:
        return Recorder(directory, identity, trackers, shown_repo(runtime))
    except BaseException:
        trackers.close("failed")
        raise


def add_to_run(run: Path, params: Params, events: Iterable[Event]) -> None:
    """Show what a later stage made in the trackers: in the run of the training that wrote `run` (its run.json).

    A stage of another experiment, or with other parameters, has a run of its own (`later_identity`). A run that is new,
    or lost, is first given the training's rows and what other stages left that is still valid; of what is damaged, a
    line is logged.
    """
    events = list(events)
    for event in events:
        if isinstance(event, Result):
            check_names(names_of(event.metrics))
    record = read_record(run)
    identity, run_hash = later_run(record, params, os.environ.get("DVC_EXP_NAME"))
    trackers = open_trackers(params.runtime, identity, run_hash, "add")
    step = record["step"]
    for earlier in (train_events(run, step), valid_events(Path("dvc.lock"), identity.params, step)):
        try:
            trackers.write_missing(earlier)
        except UserError as error:  # a view is no reason to lose what this stage has computed
            logger.warning("the trackers lack what an earlier stage left: %s", error)
    for event in events:
        trackers.write(event)
    trackers.close("finished")


def later_run(
    record: Mapping[str, Any], params: Params, experiment: str | None, made_with: Mapping[str, Any] | None = None
) -> tuple[RunIdentity, str]:
    """Return identity and hash of the run that a later stage adds to, from the training's run.json.

    `made_with` has the sections of params.yaml that hold instead of those in `params`. A training that Aim has not seen
    has no hash in its record: its own, so that Aim makes one run of it, and finds it.
    """
    training = identity_of(record)
    identity = later_identity(training, params, experiment, made_with)
    return identity, (record["aim_run_hash"] if identity is training else None) or identity.own_hash


def shown_run(results: Path, params: Params) -> tuple[RunIdentity, str]:
    """Return identity and hash of the run that the results in a folder belong to, with dvc.lock beside the folder.

    It is that of the parameters that they were made with, which those in params.yaml no longer have to be.
    """
    record = read_record(training_record(results))
    experiment = os.environ.get("DVC_EXP_NAME") or applied_experiment()
    return later_run(record, params, experiment, made_with(record, results.parent / "dvc.lock"))


def record_of(identity: RunIdentity, run_hash: str | None, aim_repo: str, step: int) -> dict[str, Any]:
    """Return the content of a run.json, from which `identity_of` gives the identity back."""
    return {
        "aim_run_hash": run_hash,
        "aim_repo": aim_repo,
        "name": identity.name,
        "experiment": identity.experiment,
        "tags": list(identity.tags),
        "fingerprint": identity.dvc.get("fingerprint"),
        "step": step,
        **identity.facts,
        "changes": identity.changes,
    }


def identity_of(record: Mapping[str, Any]) -> RunIdentity:
    """Return the identity that a run.json holds."""
    return RunIdentity(
        name=record["name"],
        experiment=record["experiment"],
        tags=tuple(record["tags"]),
        params=record["params"],
        architecture=record.get("architecture", {}),  # early records have none
        dvc=record["dvc"],
        env=record["env"],
        size=record["size"],
        key=str(record["fingerprint"]),
        changes=record.get("changes", {}),  # so have they none of these
    )


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a run.json; `UserError` where there is none, or something else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; run dvc repro train")
    return read_model(path, Record, REMEDY).model_dump(exclude_unset=True)


def shown_repo(runtime: RuntimeParams) -> str:
    """Return the Aim repository as run.json names it: as configured, without this machine's folders where it is not."""
    return runtime.aim_repo or ".aim"

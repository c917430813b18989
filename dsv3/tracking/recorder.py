"""The one place through which a run's numbers leave the program.

The truth is a folder of tab-separated files, which DVC versions and plots; Aim, TensorBoard and W&B are views, fed
the same rows, whose failure costs nothing. A row is on the disk when `log` returns, so a killed run keeps its
history; a resumed run gets its rows from the checkpoint, and rewrites the files up to that step (DVC deletes a
stage's outputs before it runs). The alternative, a tracker as the truth, would tie every number to a database that a
clone of the repository does not have.
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3.artifacts import read_json, write_text
from dsv3.errors import UserError
from dsv3.params.runtime import RuntimeParams
from dsv3.tracking.identity import RunIdentity, native
from dsv3.tracking.metrics import METRICS, TABLES, Cell, unknown_names
from dsv3.tracking.sink import IsolatedSink, Sink

Row = dict[str, Cell]


class Recorder:
    """Writes the tables of one run into `directory` (None: no tables, only views) and forwards all to `sinks`."""

    def __init__(
        self,
        directory: Path | None,
        identity: RunIdentity,
        sinks: Sequence[Sink],
        run_hash: str | None,
        is_owner: bool,
        aim_repo: str,
    ) -> None:
        self._directory = directory
        self._identity = identity
        self._rows: dict[str, list[Row]] = {table: [] for table in TABLES}
        self._columns: dict[str, list[str]] = {table: [] for table in TABLES}
        self._sinks = [IsolatedSink(sink) for sink in sinks]
        self._aim_repo = aim_repo
        self.run_hash = run_hash
        """Hash of the Aim run; None without Aim. Keep it in checkpoints."""
        for sink in self._sinks:
            self.run_hash = sink.open(identity, self.run_hash, is_owner) or self.run_hash
        if directory is not None and is_owner:
            self._rewrite()

    def log(self, table: str, row: Mapping[str, Cell]) -> None:
        """Append `row` to `<table>.tsv` and show it in the trackers. Numbers of any kind are stored as Python's."""
        assert table in TABLES, f"{table} is no table; known: {', '.join(TABLES)}"
        assert not unknown_names(row), f"not in dsv3/tracking/metrics.py: {', '.join(unknown_names(row))}"
        assert all(name in row for name in TABLES[table].index), f"{table} needs {', '.join(TABLES[table].index)}"
        stored: Row = native(dict(row))
        self._rows[table].append(stored)
        self._append(table, stored)
        for sink in self._sinks:
            sink.log(table, stored)

    def result(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        """Show the content of a stage's metrics.json in the trackers (the stage itself writes the file)."""
        for sink in self._sinks:
            sink.result(stage, native(dict(metrics)), step)

    def text(self, name: str, text: str, step: int, **context: str | int) -> None:
        """Show a text in the trackers."""
        for sink in self._sinks:
            sink.text(name, text, step, native(context))

    def figure(self, name: str, path: Path, step: int, **context: str | int) -> None:
        """Show an image file in the trackers."""
        for sink in self._sinks:
            sink.figure(name, path, step, native(context))

    def distribution(self, name: str, values: Sequence[float], step: int, **context: str | int) -> None:
        """Show `values` as the heights of bins 0, 1, 2 ... (such as the experts' loads) in the trackers."""
        for sink in self._sinks:
            sink.distribution(name, [float(value) for value in values], step, native(context))

    def state(self) -> dict[str, list[Row]]:
        """Return all rows so far, for a checkpoint."""
        return {table: [dict(row) for row in rows] for table, rows in self._rows.items()}

    def restore(self, state: Mapping[str, Sequence[Mapping[str, Cell]]]) -> None:
        """Replace all rows by a checkpoint's and rewrite the files; a tracker that lacks them is shown them again."""
        self._rows = {table: [dict(row) for row in state.get(table, [])] for table in TABLES}
        self._rewrite()
        for sink in self._sinks:
            if not sink.resumed:
                for table, rows in self._rows.items():
                    for row in rows:
                        sink.log(table, row)

    def run_record(self) -> dict[str, Any]:
        """Return what run.json holds: where Aim has the run, and what is needed to build it again from results/."""
        identity = self._identity
        return {
            "aim_run_hash": self.run_hash,
            "aim_repo": self._aim_repo,
            "name": identity.name,
            "experiment": identity.experiment,
            "tags": list(identity.tags),
            "fingerprint": identity.dvc.get("fingerprint"),
            "step": self._last_step(),
            "dvc": identity.dvc,
            "env": identity.env,
            "size": identity.size,
            "params": identity.params,
            "architecture": identity.architecture,
        }

    def close(self, status: str) -> None:
        """End the recording; `status` is finished, interrupted or failed."""
        for sink in self._sinks:
            sink.close(status)

    def _last_step(self) -> int:
        """Return the last step of any table; where evaluations of the finished model stand in charts."""
        return max((int(row["step"]) for rows in self._rows.values() for row in rows), default=0)

    def _append(self, table: str, row: Row) -> None:
        if self._directory is None:
            return
        if not set(row) <= set(self._columns[table]):
            self._write_table(table)
            return
        with self._path(table).open("a", encoding="utf-8", newline="\n") as file:
            file.write(_line(row, self._columns[table]))

    def _rewrite(self) -> None:
        for table in TABLES:
            self._write_table(table)

    def _write_table(self, table: str) -> None:
        if self._directory is None:
            return
        rows = self._rows[table]
        names = {name for row in rows for name in row} | set(TABLES[table].index)
        self._columns[table] = [name for name in METRICS if name in names]
        header = "\t".join(self._columns[table]) + "\n"
        write_text(self._path(table), header + "".join(_line(row, self._columns[table]) for row in rows))

    def _path(self, table: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{table}.tsv"


def _line(row: Mapping[str, Cell], columns: Sequence[str]) -> str:
    """Return one line of a table; nine significant digits give a float32 back exactly."""
    cells = (row.get(name, "") for name in columns)
    return "\t".join(f"{cell:.9g}" if isinstance(cell, float) else str(cell) for cell in cells) + "\n"


def open_recorder(
    directory: Path, runtime: RuntimeParams, identity: RunIdentity, run_hash: str | None = None
) -> Recorder:
    """Return the recorder of a training, for its main process only; `run_hash` comes from the checkpoint, if any.

    Raises `UserError` for a tracker that is not installed.
    """
    return Recorder(directory, identity, sinks(runtime), run_hash, is_owner=True, aim_repo=shown_repo(runtime))


def reopen_recorder(record: Mapping[str, Any], runtime: RuntimeParams) -> Recorder:
    """Return a recorder without tables that adds to the run of `record` (run.json), or begins one where it is gone."""
    identity = identity_of(record)
    run_hash = record["aim_run_hash"]
    return Recorder(None, identity, sinks(runtime), run_hash, is_owner=False, aim_repo=shown_repo(runtime))


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a run.json; `UserError` where there is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; run dvc repro train")
    return read_json(path)


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
    )


def shown_repo(runtime: RuntimeParams) -> str:
    """Return the Aim repository as run.json names it: as configured, without this machine's folders where it is not."""
    return runtime.aim_repo or ".aim"


def sinks(runtime: RuntimeParams) -> list[Sink]:
    """Return the trackers named in runtime.trackers, Aim first, for its hash names the run in the others."""
    return [_sink(name, runtime) for name in ("aim", "tensorboard", "wandb") if name in runtime.trackers]


def _sink(name: str, runtime: RuntimeParams) -> Sink:
    if importlib.util.find_spec(name) is None:
        group = "pipeline" if name == "aim" else name
        remedy = f"pip install --group {group} -c constraints.txt, or take it from the list"
        if name == "aim" and sys.version_info >= (3, 13):
            remedy = "it has no wheels for Python 3.13 and later; set it to [tensorboard], or use Python 3.12"
        raise UserError(f"params.yaml: runtime.trackers names {name}, which is not installed; {remedy}")
    if name == "aim":
        from dsv3.tracking.aim import AimSink

        return AimSink(runtime.aim_repo)
    if name == "tensorboard":
        from dsv3.tracking.tensorboard import TensorBoardSink

        return TensorBoardSink()
    from dsv3.tracking.wandb import WandbSink

    return WandbSink()

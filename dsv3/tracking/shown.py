"""Which of the chosen trackers show the results that are checked out, as far as the files that they keep here say.

Section `runtime` re-runs no stage, so a tracker that was named after the training has never seen it, and DVC, which
restores everything from its cache, starts nothing of ours that could say so. The report and the doctor do.
"""

import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType

from dsv3.params.read import Params
from dsv3.params.runtime import TrackerName
from dsv3.tracking.identity import RunIdentity, aim_folder, project_root
from dsv3.tracking.recorder import later_run, read_record
from dsv3.tracking.revision import applied_experiment


def missing_views(results: Path, params: Params) -> list[TrackerName]:
    """Return the trackers of `runtime.trackers` that don't show the training in `results`; none where there is none."""
    run = results / "train" / "run.json"
    if not run.is_file():
        return []
    identity, run_hash = later_run(read_record(run), params, os.environ.get("DVC_EXP_NAME") or applied_experiment())
    return [name for name in params.runtime.trackers if not SHOWS[name](params, identity, run_hash)]


def rebuilding(names: list[TrackerName]) -> str:
    """Return the command that shows the results in these trackers."""
    return "python -m dsv3.tracking.rebuild" + (f" --tracker {names[0]}" if len(names) == 1 else "")


def _in_aim(params: Params, identity: RunIdentity, run_hash: str | None) -> bool:
    folder = aim_folder(params.runtime.aim_repo)
    return folder is None or (run_hash is not None and (folder / "meta" / "chunks" / run_hash).exists())


def _in_tensorboard(params: Params, identity: RunIdentity, run_hash: str | None) -> bool:
    return (project_root() / "runs" / f"{identity.name}-{identity.key[:8]}").is_dir()


def _in_wandb(params: Params, identity: RunIdentity, run_hash: str | None) -> bool:
    return any((project_root() / "wandb").glob(f"*-{run_hash or identity.key[:24]}"))


def _in_trackio(params: Params, identity: RunIdentity, run_hash: str | None) -> bool:
    database = Path(os.environ.get("TRACKIO_DIR") or project_root() / ".trackio") / "dsv3-lab.db"
    if not database.is_file():
        return False
    query = "SELECT 1 FROM configs WHERE run_name = ?"
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return connection.execute(query, [f"{identity.name}-{identity.key[:8]}"]).fetchone() is not None
    except sqlite3.Error:
        return True  # another layout than we know; the tracker itself would tell


SHOWS: Mapping[TrackerName, Callable[[Params, RunIdentity, str | None], bool]] = MappingProxyType(
    {"aim": _in_aim, "tensorboard": _in_tensorboard, "wandb": _in_wandb, "trackio": _in_trackio}
)
"""By tracker, whether it has the run."""

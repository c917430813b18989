"""Where each tracker keeps its runs on this machine, and whether it has one, as far as its files say.

The trackers' own modules take the places from here. These functions import none of their packages, so that a command
answers at once, and where a package is not installed.
"""

import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType

from dsv3.params.runtime import RuntimeParams, TrackerName
from dsv3.tracking.identity import RunIdentity, aim_folder, project_root

PROJECT = "dsv3-lab"
"""Name under which W&B and trackio file the runs."""


def has_aim_run(runtime: RuntimeParams, identity: RunIdentity, run_hash: str | None) -> bool:
    """Return whether Aim's repository has the run of that hash; a server is taken at its word."""
    folder = aim_folder(runtime.aim_repo)
    return folder is None or (run_hash is not None and (folder / "meta" / "chunks" / run_hash).exists())


def tensorboard_folder(identity: RunIdentity) -> Path:
    """Return the folder of the run's event files."""
    return project_root() / "runs" / identity.unique_name


def has_tensorboard_run(runtime: RuntimeParams, identity: RunIdentity, run_hash: str | None) -> bool:
    """Return whether the run has a folder."""
    return tensorboard_folder(identity).is_dir()


def wandb_id(identity: RunIdentity, run_hash: str | None) -> str:
    """Return W&B's id of the run: its Aim hash, or else its own."""
    return run_hash or identity.own_hash


def wandb_folders(identity: RunIdentity, run_hash: str | None) -> list[Path]:
    """Return the folders that W&B has left of the run, one each time it was opened, online or offline."""
    return sorted((project_root() / "wandb").glob(f"*-{wandb_id(identity, run_hash)}"))


def has_wandb_run(runtime: RuntimeParams, identity: RunIdentity, run_hash: str | None) -> bool:
    """Return whether W&B has left a folder of the run."""
    return bool(wandb_folders(identity, run_hash))


def trackio_folder() -> Path:
    """Return the folder of trackio's databases."""
    return Path(os.environ.get("TRACKIO_DIR") or project_root() / ".trackio")


def has_trackio_run(runtime: RuntimeParams, identity: RunIdentity, run_hash: str | None) -> bool:
    """Return whether the project's database names the run."""
    database = trackio_folder() / f"{PROJECT}.db"
    if not database.is_file():
        return False
    query = "SELECT 1 FROM configs WHERE run_name = ?"
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return connection.execute(query, [identity.unique_name]).fetchone() is not None
    except sqlite3.Error:
        return True  # another layout than we know; the tracker itself would tell


HAS_RUN: Mapping[TrackerName, Callable[[RuntimeParams, RunIdentity, str | None], bool]] = MappingProxyType(
    {"aim": has_aim_run, "tensorboard": has_tensorboard_run, "wandb": has_wandb_run, "trackio": has_trackio_run}
)
"""By tracker, whether it has the run of that identity, or hash."""

"""What other trainings have left in `.checkpoints`, and when it is removed: never from under a process.

A finished training leaves its last checkpoint, because DVC may fail after it (its cache is full, it was killed): the
same training exports from it again. It is of no use once another training begins, which removes it. A stopped training
leaves what it goes on from; one that never does is abandoned, and after `runtime.keep_abandoned_days` removed as well.
One that was asked for (`runtime.keep_last_checkpoint`), or that the training itself names, stays.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

from dsv3.artifacts import read_model, remove_abandoned
from dsv3.errors import UserError
from dsv3.training.checkpoint import delete_checkpoints
from dsv3.training.fingerprint import FACTS, Ended, Facts
from dsv3.training.lock import hold_lock

OWN_NAME = re.compile(r"[0-9a-f]{16}")
"""Names of the trainings' folders: their fingerprints."""

DAY_S = 24 * 3600


def remove_leftovers(directory: Path, keep_days: int, named: Path | None, tell: Callable[[str], None]) -> None:
    """Remove the folders beside `directory` that nobody goes on from; `tell` a line for each abandoned one.

    `named` is the checkpoint that this training starts from.
    """
    for other in sorted(directory.parent.iterdir()):
        is_own = OWN_NAME.fullmatch(other.name) and other.is_dir() and not other.is_symlink()
        is_named = named is not None and named.resolve().is_relative_to(other.resolve())
        if not is_own or is_named or other == directory:
            continue
        try:
            if is_left(other, keep_days):
                with hold_lock(other):
                    if is_left(other, keep_days):  # still: it may have been taken up meanwhile
                        remove(other, keep_days, tell)
        except (UserError, FileNotFoundError):  # a process holds it, or has just removed it
            continue


def is_left(folder: Path, keep_days: int) -> bool:
    """Return whether the training of `folder` has finished, or was abandoned `keep_days` ago."""
    ended = ended_of(folder)
    return ended == "finished" or (ended == "no" and age_days(folder) >= keep_days)


def ended_of(folder: Path) -> Ended:
    """Return whether the training of `folder` has ended; one whose facts can't be read has not."""
    try:
        return read_model(folder / FACTS, Facts, "").ended
    except UserError:
        return "no"


def age_days(folder: Path) -> float:
    """Return the days since anything was written in `folder`."""
    return (time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))) / DAY_S


def remove(folder: Path, keep_days: int, tell: Callable[[str], None]) -> None:
    """Remove what a training has made in `folder`, and the folder where nothing else lies in it."""
    if ended_of(folder) == "no":
        line = f"removed {folder}: a training that stopped {age_days(folder):.0f} days ago and never went on"
        tell(f"{line} (runtime.keep_abandoned_days is {keep_days})")
    delete_checkpoints(folder)
    remove_abandoned(folder / FACTS)
    (folder / FACTS).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()

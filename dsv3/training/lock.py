"""One training at a time writes into a folder of checkpoints.

An orphan (DVC was killed, the stage lives on) would otherwise be writing the same files. The lock is the kernel's: it
ends with the process that holds it, however that ends, so a file that a dead process left is no obstacle. Processes
that are forked meanwhile, as those that prepare batches, do not inherit it (filelock closes it in them).

    .checkpoints/locks/<fingerprint>.lock      stays: to remove it would let two processes lock two files of one name
    .checkpoints/locks/<fingerprint>.holder    process and host, for the message to whoever comes second
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dsv3.artifacts import read_regular, write_text
from dsv3.errors import UserError


@contextmanager
def hold_lock(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process within the block; raise `UserError` where another training holds it."""
    path = directory.parent / "locks" / f"{directory.name}.lock"
    holder = path.with_suffix(".holder")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a pipe can be opened, and not cut
        raise UserError(f"{path}: is no regular file, so it can't be locked; remove it")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = read_holder(holder)
        raise UserError(
            f"{directory}: another training with the same parameters is running (process and host {owner}); wait for "
            "it or stop it"
        ) from None
    try:
        write_text(holder, f"{os.getpid()} {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def read_holder(path: Path) -> str:
    """Return the process and host that hold the lock; the file is missing for an instant before and after."""
    try:
        return read_regular(path)
    except (OSError, ValueError):
        return "unknown"

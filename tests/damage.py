"""What can happen to a file, for tests that try all of it."""

import os
from collections.abc import Callable
from pathlib import Path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """Flip the lowest bit of a byte in the second half, where a file of weights has its numbers."""
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    path.write_bytes(b'{"step": [1, 2]}\n')


def pipe(path: Path) -> None:
    """Put a pipe there, which a reader would wait for."""
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncate": truncate,
    "flip": flip,
    "empty": empty,
    "foreign": foreign,
    "missing": Path.unlink,
    "pipe": pipe,
}

"""Files that are whole or absent: atomic writes, digests, provenance.

A stage that dies half-way must not leave a file that looks finished, so everything is written beside its final name,
flushed to the disk, and renamed over it; a rename within one folder is atomic on POSIX and on Windows.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dsv3.errors import UserError

CHUNK_BYTES = 1 << 20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with reporting_full_disk(path.parent):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(path: Path, contents: Sequence[str]) -> None:
    """Raise `UserError` unless `path` is free, or a folder in which every name matches one of `contents`.

    A folder that is replaced as a whole loses everything in it, so only what an earlier run wrote may be there.
    `contents` are the names that are written, as glob patterns.
    """
    if Path.cwd().is_relative_to(path.resolve()):
        raise UserError(f"{path}: holds the working directory; name a folder that holds nothing else")
    if path.is_symlink() or not path.is_dir():
        if path.exists() or path.is_symlink():
            raise UserError(f"{path}: is no folder; name one that may be written")
        return
    foreign = sorted(entry.name for entry in path.iterdir() if not any(fnmatch(entry.name, name) for name in contents))
    if foreign:
        others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"{path}: holds {foreign[0]}{others}, which is not written here and would be lost; name another folder"
        )


@contextmanager
def replacing_directory(path: Path, contents: Sequence[str] = ("*",)) -> Iterator[Path]:
    """Yield an empty temporary directory beside `path`; put it in the place of `path` on success, else remove it.

    Raises `UserError`, before anything is written, where `path` holds what matches none of `contents`.
    """
    check_replaceable(path, contents)
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with reporting_full_disk(path.parent):
            yield temporary
            sync_directory(temporary)
            shutil.rmtree(path, ignore_errors=True)
            temporary.replace(path)
            sync_names(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def reporting_full_disk(folder: Path) -> Iterator[None]:
    """Turn a full disk within the block into a `UserError` that names the folder.

    Libraries have their own types for it: safetensors says "No space left on device" in a `SafetensorError`, torch's
    archive writer only that it failed.
    """
    try:
        yield
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        is_full = is_full or "No space left on device" in str(error)
        is_full = is_full or (
            "PytorchStreamWriter failed" in str(error) and shutil.disk_usage(folder).free < CHUNK_BYTES
        )
        if not is_full:
            raise
        free = shutil.disk_usage(folder).free
        raise UserError(f"{folder}: the disk is full ({free:,} bytes free); make room and run the same again") from None


def sync_names(folder: Path) -> None:
    """Flush the names in `folder` to the disk: a rename is not safe from a power cut before."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(path: Path) -> None:
    """Flush every file below `path` to the disk."""
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with Unix line ends, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON value in `path`; raise `UserError` where it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's and UTF-8's
        raise UserError(f"{path}: not JSON ({error}); dvc checkout brings an output back, dvc repro makes it") from None


def check_weights(folder: Path) -> None:
    """Raise `UserError` where a weight file in `folder` is damaged or cut off; no weight is read."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError as error:
            message = f"{file}: damaged or cut off ({error}); dvc checkout brings an output back, dvc repro makes it"
            raise UserError(message) from None


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of the file at `path` in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_tree(paths: Iterable[Path], root: Path) -> str:
    """Return one SHA-256 over the names (relative to `root`) and contents of `paths`, in sorted order."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(root).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()

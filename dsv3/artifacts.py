"""Files that are whole or absent: atomic writes, digests, provenance.

A stage that dies half-way must not leave a file that looks finished, so everything is written beside its final name,
flushed to the disk, and renamed over it; a rename within one folder is atomic on POSIX and on Windows.
"""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from dsv3.errors import DiskFull, UserError, is_disk_full, one_line, system_errno

REMEDY = "dvc checkout brings an output back, dvc repro makes it"
"""What to do where a stage's output is damaged."""
CHUNK_BYTES = 1 << 20
BEGINNING_BYTES = 1 << 10
"""What is read of a file to know its kind."""


class FileContent(BaseModel):
    """What a file held when it was written."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    sha256: str
    size: int


Content = TypeVar("Content", bound=BaseModel)


def temporary_name(path: Path, process: int | None = None) -> Path:
    """Return the path beside `path` under which a process (None: this one) writes it; a killed one leaves it there.

    Only processes of this host can be asked whether they live, so the name has the host in it.
    """
    return path.with_name(f".{path.name}.{_host()}.{process or os.getpid()}.tmp")


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes of this host have left of `path` under its temporary names."""
    for left in abandoned(path.parent, glob.escape(path.name)):
        _remove(left)


def abandoned(folder: Path, name: str = "*") -> Iterator[Path]:
    """Yield what killed processes of this host have left in `folder` under temporary names; `name` may be a pattern."""
    for left in folder.glob(f".{name}.{_host()}.*.tmp"):
        number = left.name.split(".")[-2]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            yield left


def sweep(paths: Collection[Path]) -> str:
    """Remove what killed processes of this host have left of `paths` and in them; return a line on it, or none."""
    places = ((path.parent, glob.escape(path.name)) for path in paths)
    inside = ((path, "*") for path in paths)
    found = dict.fromkeys(left for place in (*places, *inside) for left in abandoned(*place))
    sizes = {left: allocated_bytes(left) for left in found}
    for left in sizes:
        with suppress(OSError):  # another user's
            _remove(left)
    removed = {str(left): size for left, size in sizes.items() if not left.exists()}
    if not removed:
        return ""
    return one_line(f"removed what killed processes have left: {', '.join(removed)} ({sum(removed.values()):,} bytes)")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^\w-]", "_", socket.gethostname())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure."""
    temporary = temporary_name(path)
    try:
        with reporting_full_disk(path):
            make_folder(path.parent)
            remove_abandoned(path)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Contents:
    """The names in a folder that is written, and replaced, as a whole; glob patterns."""

    always: str
    """What each of them holds."""
    others: tuple[str, ...] = ()

    def is_foreign(self, name: str) -> bool:
        """Return whether no such folder holds anything of that name."""
        return not any(fnmatch(name, pattern) for pattern in (self.always, *self.others))


ANYTHING = Contents("*")


def check_replaceable(path: Path, contents: Contents) -> None:
    """Raise `UserError` unless `path` is free, or a folder that holds nothing or what an earlier run wrote.

    A folder that is replaced as a whole loses everything in it. Somebody's own file may have a name that we write, too:
    without what each of our folders holds, the folder is another's.
    """
    if Path.cwd().is_relative_to(path.resolve()):
        raise UserError(f"{path}: holds the working directory; name a folder that holds nothing else")
    if path.is_symlink() or not path.is_dir():
        if path.exists() or path.is_symlink():
            raise UserError(f"{path}: is no folder; name one that may be written")
        return
    names = sorted(entry.name for entry in path.iterdir())
    foreign = [name for name in names if contents.is_foreign(name)]
    if not foreign and names and not any(fnmatch(name, contents.always) for name in names):
        raise UserError(
            f"{path}: holds {names[0]} and no {contents.always}, so it was not written here and would be lost; "
            "name another folder"
        )
    if foreign:
        others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"{path}: holds {foreign[0]}{others}, which is not written here and would be lost; name another folder"
        )


def check_not_mixed(path: Path, contents: Sequence[str]) -> None:
    """Raise `UserError` where the folder `path` holds both files that match one of `contents` and others.

    `contents` are the names of files that are written into it one by one. Where they lie beside others, somebody else
    may have written them: `metrics.json` is every stage's. Hidden names are Git's and DVC's.
    """
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    ours = [entry for entry in names if any(fnmatch(entry, name) for name in contents)]
    others = [entry for entry in names if entry not in ours and not entry.startswith(".")]
    if ours and others:
        raise UserError(
            f"{path}: holds {ours[0]}, which would be replaced, beside {others[0]}, which is not written here; "
            "name another folder"
        )


def check_replaceable_file(path: Path, beginning: re.Pattern[bytes], kind: str) -> None:
    """Raise `UserError` unless `path` is free, or a file that begins as every one of this `kind` does."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the file to be written")
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            if beginning.match(file.read(BEGINNING_BYTES)):
                return
    raise UserError(f"{path}: is no {kind} and would be lost; name another file")


@contextmanager
def replacing_directory(path: Path, contents: Contents = ANYTHING) -> Iterator[Path]:
    """Yield an empty temporary directory beside `path`; put it in the place of `path` on success, else remove it.

    All of it gets the permissions that the umask gives: safetensors writes files for their owner alone, and a copy has
    those of its source.

    Raises `UserError`, before anything is written, where `path` holds something else than `contents`.
    """
    check_replaceable(path, contents)
    path = path.absolute()
    temporary = temporary_name(path)
    try:
        with reporting_full_disk(path):
            make_folder(path.parent)
            remove_abandoned(path)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            permissions = temporary.stat().st_mode & 0o777
            yield temporary
            set_permissions(temporary, permissions)
            sync_directory(temporary)
            shutil.rmtree(path, ignore_errors=True)
            temporary.replace(path)
            sync_names(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Turn what the disk refuses, within the block while `path` is written, into an error that names the place.

    A full disk, or a file that may not be so large, is `DiskFull`; what is half-written still lies beside it, and is
    part of the room that was too small. torch's archive writer has several texts, of which none names the reason: on a
    disk without room it is taken to be that. What else the system refuses a library of Rust is `OSError`.
    """
    try:
        yield
    except DiskFull:  # of a file within this folder
        raise
    except Exception as error:
        folder = next(each for each in path.parents if each.is_dir())
        free, number = shutil.disk_usage(folder).free, system_errno(error)
        is_of_torch = isinstance(error, RuntimeError) and "inline_container" in str(error)
        if not is_disk_full(error) and not (isinstance(error, RuntimeError) and free < CHUNK_BYTES):
            if is_of_torch or number == errno.EFBIG:
                line = f"{path.parent}: {path.name} can't be written ({one_line(error)}), with {free:,} bytes free"
                raise DiskFull(f"{line}; raise ulimit -f, or use a disk with larger files") from None
            if number and not isinstance(error, OSError):
                raise OSError(number, os.strerror(number), str(path)) from None
            raise
        room = free + allocated_bytes(temporary_name(path))
        line = f"{path.parent}: the disk is full: {path.name} needs more than the {room:,} bytes that are free"
        raise DiskFull(f"{line}; make room and run the same again") from None


def allocated_bytes(path: Path) -> int:
    """Return the bytes that a file, or a folder with all in it, takes on the disk; 0 for one that is missing."""
    return sum(each.lstat().st_blocks * 512 for each in (path, *path.rglob("*")) if each.exists())


def make_folder(path: Path) -> None:
    """Make the folder `path` and its parents where they are missing, and flush the new names to the disk."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync_names(folder.parent)


def sync_names(folder: Path) -> None:
    """Flush the names in `folder` to the disk: a rename is not safe from a power cut before."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_permissions(path: Path, permissions: int) -> None:
    """Give the folder `path`, and all below it, these permissions; files those of reading and writing among them."""
    for each in (path, *path.rglob("*")):
        if not each.is_symlink():
            each.chmod(permissions if each.is_dir() else permissions & 0o666)


def sync_directory(path: Path) -> None:
    """Flush every file below `path` to the disk, and every name."""
    for each in sorted((path, *path.rglob("*"))):
        if each.is_dir():
            sync_names(each)
        elif each.is_file():
            with each.open("rb") as handle:
                os.fsync(handle.fileno())


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with Unix line ends, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class NotRegularFile(OSError):
    """What was to be read is a pipe, a device or a folder."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file to be read; raise `NotRegularFile` for what is none: pipes wait for a writer, devices never end.

    Every file that another program may have put in its place is opened so.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NotRegularFile(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(handle, "rb")


def read_regular(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a file; raise `OSError` for what is no regular one, `ValueError` for another encoding."""
    with open_regular(path) as file:
        return file.read().decode(encoding)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, behind a byte order mark; raise `UserError` where it holds none."""
    try:
        value = json.loads(read_regular(path, "utf-8-sig"))
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's, and brackets without end
        raise UserError(f"{path}: not JSON ({error}); {REMEDY}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is {one_line(value)[:60]}; must be a JSON object; {REMEDY}")
    return value


def read_model(path: Path, model: type[Content], remedy: str) -> Content:
    """Return the JSON in `path` as `model`; raise `UserError`, with the `remedy`, where it is something else."""
    try:
        return model.model_validate(json.loads(read_regular(path)))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); {remedy}") from None
    except ValidationError as error:
        raise invalid(path, error, remedy) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {remedy}") from None


def invalid(path: Path, error: ValidationError, remedy: str) -> UserError:
    """Return what is told of a file whose content is not as its model says: the first place, and what is wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = one_line(".".join(map(str, first["loc"])) or "the file")
    return UserError(f"{path}: {where}: {first['msg']}; {remedy}")


def check_weights(folder: Path) -> None:
    """Raise `UserError` where a weight file in `folder` is damaged or cut off; no weight is read."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        if not file.is_file():
            raise UserError(f"{file}: is no regular file; {REMEDY}")
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError as error:
            message = f"{file}: damaged or cut off ({error}); {REMEDY}"
            raise UserError(message) from None


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of the file at `path` in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def file_content(path: Path) -> FileContent:
    """Return digest and size of the file at `path`."""
    return FileContent(sha256=sha256_file(path), size=path.stat().st_size)


def difference_from(path: Path, content: FileContent) -> str:
    """Return in a few words how the file at `path` differs from `content`; empty where it does not."""
    try:
        if not path.is_file():
            return f"{path.name} is missing"
        size = path.stat().st_size
        if size != content.size:
            return f"{path.name} has {size:,} bytes instead of {content.size:,}"
        return "" if sha256_file(path) == content.sha256 else f"{path.name} has another SHA-256 than was written"
    except OSError as error:
        return f"{path.name} can't be read ({error.strerror})"


def sha256_lines(digests: Mapping[str, str]) -> str:
    """Return one SHA-256 over the names of files and the digests of their contents, in sorted order."""
    lines = (f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()

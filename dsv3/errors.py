"""The one exception type for a user's mistake.

Everything a user can get wrong (a parameter, a missing file, an unreachable source) is raised as `UserError`; the
command line prints it as one line and exits with status 2. Anything else that is raised is the program's own mistake
and keeps its traceback.
"""

import errno
import re
import signal
from typing import Any

LOST_PROCESS_STATUS = 75
"""Exit status of a process that ends because another one of its training has: EX_TEMPFAIL, never the first cause."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a training to stop: Ctrl-C, a scheduler, a terminal that is gone."""


class UserError(Exception):
    """A mistake of the user's: where, the value, the bound, the remedy, in one line."""


class DiskFull(UserError):
    """There is no room for what is written, or a file may not be so large: where, how much there is, the remedy."""


def system_errno(error: BaseException) -> int:
    """Return the number of the system's error, which Rust's libraries state in a text; 0 for an error of others."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def is_disk_full(error: BaseException) -> bool:
    """Return whether the system had no room for a file; libraries say so in texts of their own types."""
    is_known = system_errno(error) in (errno.ENOSPC, errno.EDQUOT)
    return is_known or any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory could not be had; torch says so in a type for GPUs and in texts, safetensors in a text."""
    is_known = isinstance(error, MemoryError) or system_errno(error) == errno.ENOMEM
    texts = ("can't allocate memory", "Cannot allocate memory")
    return is_known or type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in texts)


def one_line(value: Any) -> str:
    """Return a message, or another value, as one line of printable characters: a name in it can't steer a terminal."""
    return " ".join("".join(each if each.isprintable() else " " for each in str(value)).split())


class Interrupted(Exception):
    """A training stopped by SIGINT or SIGTERM after its state was saved; `exit_status` is 128 + the signal's number."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status

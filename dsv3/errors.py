"""The one exception type for a user's mistake.

Everything a user can get wrong (a parameter, a missing file, an unreachable source) is raised as `UserError`; the
command line prints it as one line and exits with status 2. Anything else that is raised is the program's own mistake
and keeps its traceback.
"""

from typing import Any

LOST_PROCESS_STATUS = 75
"""Exit status of a process that ends because another one of its training has: EX_TEMPFAIL, never the first cause."""


class UserError(Exception):
    """A mistake of the user's: where, the value, the bound, the remedy, in one line."""


def one_line(value: Any) -> str:
    """Return a message, or another value, as one line of printable characters: a name in it can't steer a terminal."""
    return " ".join("".join(each if each.isprintable() else " " for each in str(value)).split())


class Interrupted(Exception):
    """A training stopped by SIGINT or SIGTERM after its state was saved; `exit_status` is 128 + the signal's number."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status

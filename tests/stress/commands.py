"""A stage's command, run in this process as `python -m stages.x` runs it: how it ended, and what it said."""

import contextlib
import io
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer

from dsv3.cli import run_app, without_eof

LIMIT_S = 5.0
"""No stage may be busy with a damaged input for longer, in seconds of the processor: others may use it too."""
WAIT_S = 60.0
"""No stage may wait for longer, for a pipe without a writer for example."""
TIMERS = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}


class Hang(BaseException):
    """Raised by an alarm; no `except Exception` of a stage catches it."""


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    kind: str
    """accepted, refused, traceback or hang."""

    said: str
    """Its line where it refused, its output where it accepted, else the traceback."""

    seconds: float


def _alarm(signum: int, frame: object) -> None:
    raise Hang


def ending(main: Callable[..., None], *arguments: str | Path, limit_s: float = LIMIT_S) -> Ending:
    """Run a stage's `main` with the options in `arguments`, for `limit_s` at most."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(without_eof(main))
    out, err, begin = io.StringIO(), io.StringIO(), time.process_time()
    given, handlers = sys.argv, {number: signal.signal(number, _alarm) for number in TIMERS}
    sys.argv = [main.__module__, *map(str, arguments)]
    kind, said = "accepted", ""
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    signal.setitimer(signal.ITIMER_REAL, max(WAIT_S, limit_s))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_app(app)
    except SystemExit as end:
        kind = {0: "accepted", None: "accepted", 2: "refused"}.get(end.code, "traceback")
        said = f"status {end.code}: {out.getvalue()}{err.getvalue()}" if kind == "traceback" else ""
    except Hang:
        kind, said = "hang", traceback.format_exc()
    except BaseException:
        kind, said = "traceback", traceback.format_exc()
    finally:
        for number, timer in TIMERS.items():
            signal.setitimer(timer, 0)
            signal.signal(number, handlers[number])
        sys.argv = given
        logging.getLogger().handlers.clear()  # the command's, which writes to what it took for the terminal
    said = said or {"accepted": out.getvalue(), "refused": err.getvalue()}[kind]
    return Ending(kind, said, time.process_time() - begin)


def first_refusal(*commands: tuple, limit_s: float = LIMIT_S) -> Ending:
    """Run commands until one does not accept; return that one's ending, or the last's with all that was said."""
    endings = []
    for command in commands:
        endings.append(ending(*command, limit_s=limit_s))
        if endings[-1].kind != "accepted":
            return endings[-1]
    said = "".join(each.said for each in endings)
    return Ending("accepted", said, max(each.seconds for each in endings))

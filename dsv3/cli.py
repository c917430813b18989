"""How a stage becomes a command: options from its signature, one line for a user's mistake.

Kept free of heavy imports: `python -m stages.<name> --help` must answer at once.
"""

import errno
import logging
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, signature
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3.errors import LOST_PROCESS_STATUS, Interrupted, UserError, one_line

ParamsOption = Annotated[
    Path, typer.Option("--params", help="The parameters, validated whole before anything else happens.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Validate, look at the inputs, print the plan, write nothing.")
]

MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EROFS, errno.EIO, errno.EMFILE}
"""Errors of the machine, not of the program, that may name no file."""
LOST_PROCESS_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError"}

_hanging: list[threading.Thread] = []


def end_despite(thread: threading.Thread) -> None:
    """Let the process end although `thread` may never do: Python would wait for it, or for what it waits for."""
    _hanging.append(thread)


@contextmanager
def ending_despite_hanging_threads() -> Iterator[None]:
    """End the process with the block's own status, without Python's shutdown, where a thread still hangs."""
    try:
        yield
    except SystemExit as end:
        if any(thread.is_alive() for thread in _hanging):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def command(main: Callable[..., None]) -> None:
    """Run `main` as a command line; a `UserError` is printed as one line and ends the process with status 2."""
    # Read when torch loads OpenMP, which is later. Its threads spin while they wait for each other: with one other
    # busy program on two cores, small matrix products become many times slower. This bound costs nothing (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Read when transformers is imported: it would draw a bar for each file of weights that it writes or reads.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(without_eof(main))
    run_app(app)


def stage(main: Callable[..., None]) -> None:
    """Run `main` as a stage's command line; required options that are not given have the values of dvc.yaml.

    Where dvc.yaml does not lie in the working directory, they have to be given.
    """
    spec = main.__globals__["__spec__"]  # None for `python stages/train.py`
    if spec is not None and "--help" not in sys.argv:
        sys.argv += missing_options(main, sys.argv[1:], spec.name, Path("dvc.yaml"))
    command(main)


def missing_options(main: Callable[..., None], given: Sequence[str], module: str, pipeline: Path) -> list[str]:
    """Return the required options of `main` that are not `given`, with the pipeline's values, as far as it has them."""
    required = [name for name, option in signature(main).parameters.items() if option.default is Parameter.empty]
    options = [f"--{name.replace('_', '-')}" for name in required]
    missing = set(options) - {word.split("=")[0] for word in given}
    if not missing:
        return []  # as DVC calls it: its file is not read again
    words = command_of(module, pipeline)
    return [word for option, value in pairwise(words) if option in missing for word in (option, value)]


def command_of(module: str, pipeline: Path) -> list[str]:
    """Return the arguments of `module` in the pipeline's file; none if it can't be read or has no such stage."""
    from ruamel.yaml import YAML, YAMLError

    try:
        stages = YAML(typ="safe").load(pipeline.read_text(encoding="utf-8"))["stages"].values()
        commands = [shlex.split(described["cmd"]) for described in stages]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, YAMLError):
        return []  # the file is DVC's to judge
    return next((words[3:] for words in commands if words[:3] == ["python", "-m", module]), [])


def without_eof(main: Callable[..., None]) -> Callable[..., None]:
    """Return `main` with `EOFError` as another error: Typer takes it for the end of a dialogue and says "Aborted!"."""

    @wraps(main)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            main(*arguments, **options)
        except EOFError as error:
            raise RuntimeError(f"unexpected end of a file: {error}") from error

    return run


def machine_fault(error: RuntimeError) -> tuple[str, int]:
    """Return the line and the exit status for an error of torch that is no mistake of the program; else no line.

    For memory on a GPU and for NCCL torch has types; for memory on a CPU and for gloo it has texts.
    """
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        what = ". ".join(one_line(error).split(". ")[:2])  # torch goes on for ten lines
        return f"out of memory ({what}); take smaller batches, or set train.gradient_checkpointing", 2
    if type(error).__name__ in LOST_PROCESS_TYPES or "gloo/transport" in str(error):
        line = (
            "another process of this training has ended, so this one ends; dvc repro goes on from the last checkpoint"
        )
        return line, LOST_PROCESS_STATUS
    return "", 1


@ending_despite_hanging_threads()
def run_app(app: typer.Typer) -> None:
    """Run a command line; a `UserError` is printed as one line and ends the process with status 2.

    So is what the system refuses: no permission, a folder where a file should be, no space, no memory.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.filename is None and error.errno not in MACHINE_ERRORS:
            raise
        print(one_line(f"{error.filename or Path.cwd()}: {error.strerror}"), file=sys.stderr)
        raise SystemExit(2) from None
    except MemoryError as error:
        print(
            f"out of memory{f' ({error})' if str(error) else ''}; use a machine with more, or less data at a time",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except RuntimeError as error:
        line, status = machine_fault(error)
        if not line:
            raise
        print(line, file=sys.stderr)
        raise SystemExit(status) from None
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        raise SystemExit(interrupted.exit_status) from None

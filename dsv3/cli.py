"""How a stage becomes a command: options from its signature, one line for a user's mistake.

Kept free of heavy imports: `python -m stages.<name> --help` must answer at once.
"""

import atexit
import errno
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, signature
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3.errors import LOST_PROCESS_STATUS, Interrupted, UserError, is_disk_full, is_out_of_memory, one_line

ParamsOption = Annotated[
    Path, typer.Option("--params", help="The parameters, validated whole before anything else happens.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Validate, look at the inputs, print the plan, write nothing.")
]

MACHINE_ERRORS = {errno.EROFS, errno.EIO, errno.EMFILE}
"""Errors of the machine, not of the program, that may name no file."""
LOST_PROCESS_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError"}

_skips_shutdown = threading.Event()


def skip_shutdown() -> None:
    """Let the process end without Python's shutdown, which waits for what a library has left open, perhaps for ever."""
    _skips_shutdown.set()


@contextmanager
def ending_without_shutdown() -> Iterator[None]:
    """End the process with the block's own status at once where `skip_shutdown` was called; else leave it to Python."""
    try:
        yield
    except BaseException as end:
        if not _skips_shutdown.is_set():
            raise
        status: Any = 1
        if isinstance(end, SystemExit):
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        else:
            traceback.print_exc()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    finally:
        # All is done: Ctrl-C in the last milliseconds would only print what it has met in some library's exit handler.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


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

    Where dvc.yaml does not lie in the working directory, they have to be given. Unless it is a dry run, what killed
    processes have left under temporary names of the options' paths is removed first, with a line.
    """
    spec = main.__globals__["__spec__"]  # None for `python stages/train.py`
    if spec is not None and "--help" not in sys.argv:
        sys.argv += missing_options(main, sys.argv[1:], spec.name, Path("dvc.yaml"))
    command(after_sweep(main))


def after_sweep(main: Callable[..., None]) -> Callable[..., None]:
    """Return `main` as it runs when temporary files of its paths, left by killed processes, are removed."""

    @wraps(main)
    def run(*arguments: Any, **options: Any) -> None:
        from dsv3.artifacts import sweep  # imports pydantic, which --help does without

        paths = [value for value in options.values() if isinstance(value, Path)]
        if not options.get("dry_run") and (line := sweep(paths)):
            print(line)
        main(*arguments, **options)

    return run


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

    from dsv3.artifacts import read_regular

    try:
        stages = YAML(typ="safe").load(read_regular(pipeline))["stages"].values()
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


@ending_without_shutdown()
def run_app(app: typer.Typer) -> None:
    """Run a command line; a `UserError` is printed as one line and ends the process with status 2.

    So is what the system refuses: no permission, a folder where a file should be, no space, no memory.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        raise SystemExit(interrupted.exit_status) from None
    except Exception as error:
        line = users_line(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        raise SystemExit(LOST_PROCESS_STATUS if is_lost_process(error) else 2) from None


def is_lost_process(error: Exception) -> bool:
    """Return whether another process of a distributed training is gone: NCCL has types for it, gloo a text."""
    return type(error).__name__ in LOST_PROCESS_TYPES or "gloo/transport" in str(error)


def users_line(error: Exception) -> str | None:
    """Return the one line of an error that is the user's or the machine's; None for one of the program's own."""
    if isinstance(error, UserError):
        return one_line(error)
    if is_disk_full(error):
        where = Path(getattr(error, "filename", None) or Path.cwd())
        folder = next(each for each in (where, *where.absolute().parents) if each.is_dir())
        free = shutil.disk_usage(folder).free
        return f"{where}: the disk is full ({free:,} bytes free); make room and run the same again"
    if is_out_of_memory(error):
        what = ". ".join(one_line(error).split(". ")[:2])  # torch goes on for ten lines
        remedy = "use a machine with more, smaller batches, less data at a time, or train.gradient_checkpointing"
        return f"out of memory{f' ({what})' if what else ''}; {remedy}"
    if found := re.search(r"(\S+) does not have a deterministic implementation", str(error)):  # torch's text
        return (
            f"params.yaml: runtime.full_determinism is true; torch has no deterministic {found[1]} on this device; "
            "set it to false"
        )
    if isinstance(error, OSError) and (error.filename is not None or error.errno in MACHINE_ERRORS):
        return one_line(f"{error.filename or Path.cwd()}: {error.strerror}")
    return lost_process_line(error)


def lost_process_line(error: Exception) -> str | None:
    """Return the one line of an error that another process's end has caused; None for any other."""
    if is_lost_process(error):
        return (
            "another process of this training has ended or no longer answers, so this one ends; dvc repro goes on from "
            "the last checkpoint"
        )
    if str(error).startswith("DataLoader worker (pid"):  # torch's text, for one that was killed
        remedy = "make memory free, or set runtime.dataloader_num_workers to 0"
        return f"{one_line(error).rstrip('.')}: {remedy}; dvc repro goes on from the last checkpoint"
    if type(error).__name__ == "BrokenProcessPool":
        return "a process that encodes was killed, as a system does that is short of memory; run the same again"
    return None

"""How a stage becomes a command: options from its signature, one line for a user's mistake.

Kept free of heavy imports: `python -m stages.<name> --help` must answer at once.
"""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dsv3.errors import Interrupted, UserError

ParamsOption = Annotated[
    Path, typer.Option("--params", help="The parameters, validated whole before anything else happens.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Validate, look at the inputs, print the plan, write nothing.")
]


def command(main: Callable[..., None]) -> None:
    """Run `main` as a command line; a `UserError` is printed as one line and ends the process with status 2."""
    # Read when torch loads OpenMP, which is later. Its threads spin while they wait for each other: with one other
    # busy program on two cores, small matrix products become many times slower. This bound costs nothing (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    run_app(app)


def run_app(app: typer.Typer) -> None:
    """Run a command line; a `UserError` is printed as one line and ends the process with status 2.

    So is what the system refuses about a file that it names: no permission, no space, a folder where a file should be.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except UserError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        raise SystemExit(interrupted.exit_status) from None

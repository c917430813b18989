"""Aim's interface with the comparisons that this project is for: `python -m dsv3.tracking.views`.

A comparison is a bookmark of Aim: an explorer with a query, a grouping and a table. Bookmarks lie in the repository's
database, which Aim creates when its interface starts; they are written through its own models before that. Each has a
fixed id, so that writing twice makes no doubles and links stay. A bookmark that a user has changed or deleted is left
as it is. The text explorer has no bookmarks: its comparison is a link that holds the whole state.
"""

import base64
import json
import os
import socket
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3.cli import ParamsOption, command
from dsv3.errors import UserError
from dsv3.params.read import read_params
from dsv3.params.runtime import RuntimeParams
from dsv3.tracking.identity import aim_folder
from dsv3.tracking.tracker import remedy

HOST = "127.0.0.1"
"""The interface asks for no password and can delete runs: it answers this machine alone."""

PRECISION, RUN = "run.params.env.precision", "run.props.name"
HELDOUT, VALIDATION = "evaluate.heldout.nats_per_char", "train.validation.loss"
SPEED, SECONDS = "train.tokens_per_s", "train.train_s"
MAX_VIO, DEAD = "evaluate.router.max_vio_global_max", "evaluate.router.dead_experts"
EVALUATED = f"run.{HELDOUT} > 0"
"""Query for runs with the number: one without it (still running, or stopped) would make names of the axis's numbers."""


@dataclass(frozen=True)
class Bookmark:
    """A comparison that Aim's interface keeps: an explorer and its state."""

    key: str
    """What its id is made from; never change it, or a repository gets the bookmark twice."""

    name: str
    description: str
    explorer: str
    state: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The id of the explorer's state, and the end of the bookmark's address."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"dsv3-lab/views/{self.key}"))

    @property
    def dashboard_id(self) -> str:
        """The id of Aim's dashboard, which names it."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"dsv3-lab/views/{self.key}/dashboard"))

    @property
    def path(self) -> str:
        """Where the interface shows it."""
        return f"/{self.explorer}/{self.id}"


def metric(name: str, **context: str) -> dict[str, Any]:
    """Return the choice of the metric's curves with this context; all of its curves without one."""
    label = " ".join([name, *(f'{key}="{value}"' for key, value in context.items())])
    value = {"option_name": name, "context": context or None}
    return {"label": label, "key": label, "group": name, "type": "metrics", "value": value}


def param(name: str) -> dict[str, Any]:
    """Return the choice of a parameter, or of a result that is kept with the parameters."""
    return {"label": name, "key": name, "group": name.partition(".")[0], "type": "params"}


def table(*columns: str, charts: float = 0.6) -> dict[str, Any]:
    """Return a table of the run, these columns, then all others, below charts that take this share of the page."""
    hidden = {"groups", "hash", "description", "creator", "experiment", "experiment_description"}
    hidden |= {"metric", "context", "date", "duration", "tags"}
    order = {"left": ["run"], "middle": list(columns), "right": []}
    return {"hiddenColumns": sorted(hidden - set(columns)), "columnsOrder": order, "height": str(charts)}


BOOKMARKS = (
    Bookmark(
        key="loss",
        name="Loss by precision",
        description="Training and validation loss, in nats/token: a color per precision, a stroke per run",
        explorer="metrics",
        state={
            "select": {"options": [metric("loss", subset="train"), metric("loss", subset="val")]},
            "grouping": {"color": [PRECISION], "stroke": [RUN], "chart": ["context.subset"]},
            "table": table("context", HELDOUT, VALIDATION, SPEED),
        },
    ),
    Bookmark(
        key="cost",
        name="Held-out loss against cost",
        description="A point per evaluated run: nats/char of the held-out text over the seconds of the training",
        explorer="scatters",
        state={
            "select": {"options": [param(HELDOUT), param(SECONDS)], "query": EVALUATED},
            "grouping": {"color": [RUN]},
            "table": table(HELDOUT, SECONDS, SPEED),
        },
    ),
    Bookmark(
        key="runs",
        name="Runs and their headline numbers",
        description="What each evaluated run changed, and what it reached",
        explorer="params",
        state={
            "select": {
                "options": [param(name) for name in ("env.precision", SPEED, VALIDATION, HELDOUT)],
                "query": EVALUATED,
            },
            "table": table("description", HELDOUT, VALIDATION, SPEED, SECONDS, MAX_VIO, DEAD, "date", charts=0.4),
        },
    ),
    Bookmark(
        key="balance",
        name="Expert balance by layer",
        description="MaxVio: load of the busiest expert over the mean load, minus one; 0 is perfect balance",
        explorer="metrics",
        state={
            "select": {"options": [metric("max_vio")]},
            "grouping": {"color": [RUN], "chart": ["context.layer"]},
            "table": table(MAX_VIO, DEAD),
        },
    ),
    Bookmark(
        key="loads",
        name="Expert load over time",
        description="A map per validation, of layers and experts. White: mean load, blue: none, orange: twice the mean",
        explorer="images",
        state={
            "select": {"options": [metric("load_map")]},
            "grouping": {"row": [RUN]},
            "images": {"additionalProperties": {"mediaItemSize": 12}},
            "table": {**table(), "resizeMode": "hide"},
        },
    ),
    Bookmark(
        key="figures",
        name="Expert load and loss by position",
        description="Figures of the held-out text, a row per run",
        explorer="images",
        state={
            "select": {"options": [metric("expert_load"), metric("loss_by_position")]},
            "grouping": {"row": [RUN]},
            "images": {"additionalProperties": {"mediaItemSize": 40}},
            "table": {**table(), "resizeMode": "hide"},
        },
    ),
)
"""The order is that of Aim's page of bookmarks; its first page has the first five."""


def samples_path() -> str:
    """Return the path of all samples side by side: a column per run, a row per prompt."""
    query = {"form": {"advancedInput": 'texts.name == "sample"', "advancedModeOn": True}, "ranges": {"isValid": True}}
    by_run, by_prompt = [{"fields": [name], "orders": ["asc"]} for name in ("run.name", "texts.context.prompt")]
    states = {
        "query": query,
        "groupings": {"columns": by_run, "rows": by_prompt, "color": by_run},
        "vis1-c-textRenderer": {"type": "code"},  # line breaks stay
        "vis1-c-captionProperties": {"displayBoxCaption": False, "selectedFields": []},  # columns and rows say it
    }
    return "/text?" + "&".join(f"{name}={encoded(state)}" for name, state in states.items())


def encoded(state: Mapping[str, Any]) -> str:
    """Return a state as Aim's addresses hold it."""
    text = json.dumps(state, separators=(",", ":"))  # Aim decodes percent signs, of which it has none
    return "O-" + base64.urlsafe_b64encode(text.encode("ascii")).decode("ascii").rstrip("=")


def write_bookmarks(repository: Path) -> None:
    """Write the bookmarks into the Aim repository, a folder `.aim`; those that a user changed or deleted stay so."""
    from aim.cli.utils import build_db_upgrade_command, exec_cmd
    from aim.web.configs import AIM_UI_MOUNTED_REPO_PATH

    os.environ[AIM_UI_MOUNTED_REPO_PATH] = str(repository.parent)  # read when Aim's models are imported, and by alembic
    exec_cmd(build_db_upgrade_command())  # as `aim up` begins
    from aim.web.api.dashboard_apps.models import ExploreState
    from aim.web.api.dashboards.models import Dashboard
    from aim.web.api.db import get_contexted_session

    with get_contexted_session() as session:
        for bookmark in BOOKMARKS:
            write_row(session, Dashboard(bookmark.name, bookmark.description), {"uuid": bookmark.dashboard_id})
            state = {"uuid": bookmark.id, "type": bookmark.explorer, "state": json.dumps(bookmark.state)}
            write_row(session, ExploreState(), {**state, "dashboard_id": bookmark.dashboard_id})
        session.commit()


def write_row(session: Any, row: Any, values: Mapping[str, Any]) -> None:
    """Write a row of Aim's database unless a user has changed it: then Aim has moved `updated_at`."""
    known = session.get(type(row), values["uuid"])
    if known is None or known.created_at == known.updated_at:
        now = datetime.now(UTC)
        for name, value in {**values, "created_at": now, "updated_at": now}.items():
            setattr(row, name, value)
        session.merge(row)


def tracked_runs(runtime: RuntimeParams) -> Path:
    """Return the folder `.aim` that runs go to; `UserError` where there is none."""
    folder = aim_folder(runtime.aim_repo)
    if folder is None:
        raise UserError(f"runtime.aim_repo is {runtime.aim_repo}; must be a folder; run this on the server's machine")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; no run has been tracked yet, make repro makes one")
    return folder


def check_can_be_written(repository: Path) -> None:
    """Raise `UserError` where Aim can't write: it keeps its database and its index there, even to show runs."""
    for path in (repository, repository / "run_metadata.sqlite", repository / "aim_db"):
        if path.exists() and not os.access(path, os.W_OK):
            remedy = "to look at runs, Aim writes too; copy the folder, and set runtime.aim_repo to the copy"
            raise UserError(f"{path}: can't be written; {remedy}")


def check_port(port: int) -> None:
    """Raise `UserError` where another program listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            reason = f"--port is {port}; must be free ({error.strerror})"
            raise UserError(
                f"{reason}; if it is Aim, open http://{HOST}:{port}/bookmarks, else choose another"
            ) from None


def address_lines(address: str) -> list[str]:
    """Return where the bookmarks are, a line each."""
    pages = {bookmark.name: bookmark.path for bookmark in BOOKMARKS} | {"Samples side by side": samples_path()}
    return [f"All views: {address}/bookmarks", *(f"  {name}: {address}{path}" for name, path in pages.items())]


def main(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the interface answers.")] = 43800,
    serve: Annotated[bool, typer.Option(help="Start the interface when the views are written.")] = True,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Write the comparisons of runs into Aim, say where they are, and start Aim's interface, on this machine only."""
    repository = tracked_runs(read_params(params).runtime)
    check_can_be_written(repository)
    if serve:
        check_port(port)
    try:
        write_bookmarks(repository)
    except ImportError as error:
        raise UserError(f"Aim can't be imported ({error}); {remedy('aim')}") from None
    for line in address_lines(f"http://{HOST}:{port}"):
        typer.echo(line)
    if serve:
        sys.stdout.flush()
        run_aim = "from aim.cli.cli import cli_entry_point; cli_entry_point()"
        options = ["--host", HOST, "--port", str(port), "--repo", str(repository.parent)]
        os.execv(sys.executable, [sys.executable, "-c", run_aim, "up", *options])


if __name__ == "__main__":
    command(main)

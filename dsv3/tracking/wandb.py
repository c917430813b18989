"""Weights & Biases: online by the user's own account, or `WANDB_MODE=offline`."""

import html
import importlib
from typing import Any

import numpy as np

from dsv3.markdown import escaped
from dsv3.params.runtime import RuntimeParams
from dsv3.tracking.events import Distribution, Event, Figure, Heatmap, Result, Row, Text, path_name
from dsv3.tracking.identity import RunIdentity, project_root
from dsv3.tracking.loads import picture
from dsv3.tracking.metrics import TABLES, curve_names
from dsv3.tracking.places import PROJECT, wandb_folders, wandb_id
from dsv3.tracking.tracker import Mode

wandb: Any = importlib.import_module("wandb")  # an extra, which type checkers need not find


OFFLINE = ("offline", "dryrun")
"""Modes in which W&B asks no server, so that it knows no run as resumed."""

LAST_ROW = "last_row"
"""Entry of a run's summary: the step of its last row. W&B's own of `step` is also that of later stages' texts."""


def tracker(runtime: RuntimeParams) -> "WandbTracker":
    """Return the tracker; W&B reads its settings from the environment."""
    return WandbTracker()


class WandbTracker:
    """Shows a run under the id of its Aim hash, or else of its key, so that later stages find it again.

    A training that goes on, and a rebuild, add the rows beyond the last one that the run has: W&B neither deletes rows
    nor takes them twice without drawing them twice. A gap before that row stays. Offline nobody says which one it is: a
    run that has a folder here counts as whole.
    """

    def __init__(self) -> None:
        self.has_rows = False
        self._last_step = -1

    def open(self, identity: RunIdentity, run_hash: str | None, mode: Mode) -> str | None:
        """Create the run or go on with the one of the same id; the ids are ours, so no hash is returned."""
        is_here = bool(wandb_folders(identity, run_hash))
        self._run = wandb.init(
            project=PROJECT,
            dir=str(project_root()),
            id=wandb_id(identity, run_hash),
            name=identity.title,
            notes=", ".join(map(escaped, identity.change_tags)),  # Markdown
            group=identity.experiment,
            tags=list(identity.tags),
            resume="allow",
            config=identity.facts,
        )
        is_known, summary = bool(self._run.resumed), self._run.summary
        if is_known:
            self._last_step = int(summary.get(LAST_ROW, summary.get("step", -1)))  # early runs have no LAST_ROW
        # a training that goes on, and a rebuild, offer all rows, of which `write` takes those that are lacking
        self.has_rows = (is_known and mode == "add") or (is_here and self._run.settings.mode in OFFLINE)
        # our own x axis: W&B's counter refuses rows of an earlier step, which a resumed run has
        self._run.define_metric("*", step_metric="step")

    def write(self, event: Event) -> None:
        """Log the event; curves are named `<subset>/<name>`, and of a layer `<subset>/<name>/layer_<i>`."""
        if self._is_held(event):
            return
        match event:
            case Row(table, cells):
                step = int(cells["step"])
                self._run.log({"step": step, **curve_names(table, cells)})
                self._run.summary[LAST_ROW] = step
            case Result(stage, metrics, _):
                for name, value in metrics.items():
                    self._run.summary[f"{stage}/{name}"] = value
            case Text(name, text, step, context):
                self._log(path_name(name, context), wandb.Html(f"<pre>{html.escape(text, quote=False)}</pre>"), step)
            case Figure(name, _, step, context) | Heatmap(name, _, _, step, context):
                self._log(path_name(name, context), wandb.Image(picture(event), caption=event.caption), step)
            case Distribution(name, heights, step, context):
                edges = np.arange(len(heights) + 1)
                histogram = wandb.Histogram(np_histogram=(np.asarray(heights), edges))
                self._log(path_name(name, context), histogram, step)

    def _is_held(self, event: Event) -> bool:
        """Return whether the run had the row, or what follows from it, when it was opened."""
        match event:
            case Row(_, cells):
                return int(cells["step"]) <= self._last_step
            case Distribution(_, _, step, context) | Heatmap(_, _, _, step, context):
                return context.get("subset") == TABLES["router"].subset and step <= self._last_step
            case _:
                return False

    def _log(self, name: str, value: Any, step: int) -> None:
        self._run.log({"step": step, name: value})

    def close(self, status: str) -> None:
        """Note how the run ended, upload what is left, and close."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "finished" else 1)

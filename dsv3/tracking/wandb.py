"""Weights & Biases: online by the user's own account, or `WANDB_MODE=offline`."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.tracking.identity import RunIdentity, project_root
from dsv3.tracking.metrics import Cell, curve_names

wandb: Any = importlib.import_module("wandb")  # an extra, which type checkers need not find


class WandbSink:
    """Shows a run under the id of its Aim hash, or else of its fingerprint, so that later stages find it again."""

    name = "W&B"

    def __init__(self) -> None:
        self.resumed = False

    def open(self, identity: RunIdentity, run_hash: str | None, is_owner: bool) -> str | None:
        """Create the run or go on with the one of the same id; the ids are ours, so no hash is returned."""
        self._run = wandb.init(
            project="dsv3-lab",
            dir=str(project_root()),
            id=run_hash or str(identity.dvc.get("fingerprint"))[:24],
            name=identity.name,
            group=identity.experiment,
            tags=list(identity.tags),
            resume="allow",
            config={
                "params": identity.params,
                "architecture": identity.architecture,
                "dvc": identity.dvc,
                "env": identity.env,
                "size": identity.size,
            },
        )
        self.resumed = bool(self._run.resumed)
        # our own x axis: W&B's counter refuses rows of an earlier step, which a resumed run has
        self._run.define_metric("*", step_metric="step")

    def log(self, table: str, row: Mapping[str, Cell]) -> None:
        """Log the row's numbers as `<subset>/<name>`, of a layer as `<subset>/<name>/layer_<i>`."""
        self._run.log({"step": int(row["step"]), **curve_names(table, row)})

    def result(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        """Put the metrics into the run's summary."""
        for name, value in metrics.items():
            self._run.summary[f"{stage}/{name}"] = value

    def text(self, name: str, text: str, step: int, context: Mapping[str, Any]) -> None:
        """Log a text."""
        shown = wandb.Html(f"<pre>{_escaped(text)}</pre>")
        self._run.log({"step": step, _key(name, context): shown})

    def figure(self, name: str, path: Path, step: int, context: Mapping[str, Any]) -> None:
        """Log an image file."""
        self._run.log({"step": step, _key(name, context): wandb.Image(str(path))})

    def distribution(self, name: str, values: Sequence[float], step: int, context: Mapping[str, Any]) -> None:
        """Log bin heights as a histogram over 0 ... len(values)."""
        edges = np.arange(len(values) + 1)
        histogram = wandb.Histogram(np_histogram=(np.asarray(values), edges))
        self._run.log({"step": step, _key(name, context): histogram})

    def close(self, status: str) -> None:
        """Note how the run ended, upload what is left, and close."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "finished" else 1)


def _key(name: str, context: Mapping[str, Any]) -> str:
    return "/".join([name, *(str(value).strip().replace("\n", " ")[:40] for value in context.values())])


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")

"""TensorBoard: event files under `runs/` beside `.aim`."""

import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from dsv3.markdown import escaped, table
from dsv3.params.runtime import RuntimeParams
from dsv3.tracking.events import Distribution, Event, Figure, Heatmap, Result, Row, Text, path_name
from dsv3.tracking.identity import RunIdentity
from dsv3.tracking.loads import picture
from dsv3.tracking.metrics import curve_names
from dsv3.tracking.places import tensorboard_folder
from dsv3.tracking.stages import charted
from dsv3.tracking.tracker import Mode


def tracker(runtime: RuntimeParams) -> "TensorBoardTracker":
    """Return the tracker; nothing of it is configured."""
    return TensorBoardTracker()


class TensorBoardTracker:
    """Writes `runs/<name>-<key>`; a training, and a rebuild, begin the folder anew."""

    has_rows = False

    def open(self, identity: RunIdentity, run_hash: str | None, mode: Mode) -> str | None:
        """Open the run's folder; TensorBoard gives no hashes."""
        folder = tensorboard_folder(identity)
        if mode != "add":
            # event files can't be rewritten: points after the checkpoint would be drawn twice
            shutil.rmtree(folder, ignore_errors=True)
        self.has_rows = folder.is_dir()
        self._writer = SummaryWriter(str(folder))
        if not self.has_rows:
            self._writer.add_text("changes", ", ".join(map(escaped, identity.change_tags)), 0)
            self._writer.add_text("params", _table(identity.params), 0)
            self._writer.add_text("architecture", _table(identity.architecture), 0)

    def write(self, event: Event) -> None:
        """Write the event; curves are named `<subset>/<name>`, and of a layer `<subset>/<name>/layer_<i>`."""
        match event:
            case Row(table, cells):
                for name, value in curve_names(table, cells).items():
                    self._writer.add_scalar(name, value, int(cells["step"]))
            case Result(stage, metrics, step):
                for subset, name, value in charted(stage, metrics):
                    self._writer.add_scalar(f"{stage}/{subset}/{name}", value, step)
            case Text(name, text, step, context):
                code = "\n".join(f"    {line}" for line in text.splitlines())  # as it is, line breaks too
                self._writer.add_text(path_name(name, context), code, step)
            case Figure(name, _, step, context) | Heatmap(name, _, _, step, context):
                image = np.asarray(picture(event))
                self._writer.add_image(path_name(name, context), image, step, dataformats="HWC")
            case Distribution(name, heights, step, context):
                self._write_histogram(path_name(name, context), np.asarray(heights, dtype=np.float64), step)

    def _write_histogram(self, name: str, heights: np.ndarray, step: int) -> None:
        """Write bin heights as a histogram over 0 ... len(heights)."""
        centers = np.arange(len(heights)) + 0.5
        self._writer.add_histogram_raw(
            name,
            min=0.0,
            max=float(len(heights)),
            num=float(heights.sum()),
            sum=float((heights * centers).sum()),
            sum_squares=float((heights * centers**2).sum()),
            bucket_limits=list(range(1, len(heights) + 1)),
            bucket_counts=list(heights),
            global_step=step,
        )

    def close(self, status: str) -> None:
        """Flush and close."""
        self._writer.add_text("status", status, 0)
        self._writer.close()


def _table(sections: Mapping[str, Any]) -> str:
    """Return nested parameters as a Markdown table."""
    rows = [
        (f"{section}{'.' if name else ''}{name}", value)
        for section, values in sections.items()
        for name, value in (values if isinstance(values, Mapping) else {"": values}).items()
    ]
    return table(["parameter", "value"], ["---", "---"], rows)

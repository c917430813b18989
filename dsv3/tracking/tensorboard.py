"""TensorBoard: event files under `runs/` beside `.aim`."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from dsv3.tracking.identity import RunIdentity, project_root
from dsv3.tracking.metrics import Cell, curve_names, scores


class TensorBoardSink:
    """Writes `runs/<name>-<fingerprint>`; a training begins the folder anew and is shown its restored rows again."""

    name = "TensorBoard"
    resumed = False

    def open(self, identity: RunIdentity, run_hash: str | None, is_owner: bool) -> str | None:
        """Open the run's folder; TensorBoard gives no hashes."""
        folder = project_root() / "runs" / f"{identity.name}-{str(identity.dvc.get('fingerprint'))[:8]}"
        if is_owner:
            # event files can't be rewritten: points after the checkpoint would be drawn twice
            shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        if is_owner:
            self._writer.add_text("params", _table(identity.params), 0)
            self._writer.add_text("architecture", _table(identity.architecture), 0)

    def log(self, table: str, row: Mapping[str, Cell]) -> None:
        """Write the row's numbers as `<subset>/<name>`, of a layer as `<subset>/<name>/layer_<i>`."""
        for name, value in curve_names(table, row).items():
            self._writer.add_scalar(name, value, int(row["step"]))

    def result(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        """Write the scores of splits."""
        for subset, name, value in scores(stage, metrics):
            self._writer.add_scalar(f"{stage}/{subset}/{name}", value, step)

    def text(self, name: str, text: str, step: int, context: Mapping[str, Any]) -> None:
        """Write a text, its line breaks kept."""
        self._writer.add_text(_tag(name, context), "    " + text.replace("\n", "\n    "), step)

    def figure(self, name: str, path: Path, step: int, context: Mapping[str, Any]) -> None:
        """Write an image."""
        pixels = np.asarray(Image.open(path).convert("RGB"))
        self._writer.add_image(_tag(name, context), pixels, step, dataformats="HWC")

    def distribution(self, name: str, values: Sequence[float], step: int, context: Mapping[str, Any]) -> None:
        """Write bin heights as a histogram over 0 ... len(values)."""
        heights = np.asarray(values, dtype=np.float64)
        centres = np.arange(len(heights)) + 0.5
        self._writer.add_histogram_raw(
            _tag(name, context),
            min=0.0,
            max=float(len(heights)),
            num=float(heights.sum()),
            sum=float((heights * centres).sum()),
            sum_squares=float((heights * centres**2).sum()),
            bucket_limits=list(range(1, len(heights) + 1)),
            bucket_counts=list(heights),
            global_step=step,
        )

    def close(self, status: str) -> None:
        """Flush and close."""
        self._writer.add_text("status", status, 0)
        self._writer.close()


def _tag(name: str, context: Mapping[str, Any]) -> str:
    return "/".join([name, *(str(value).strip().replace("\n", " ")[:40] for value in context.values())])


def _table(sections: Mapping[str, Any]) -> str:
    """Return nested parameters as a Markdown table."""
    lines = ["| parameter | value |", "|---|---|"]
    for section, values in sections.items():
        for name, value in (values if isinstance(values, Mapping) else {"": values}).items():
            lines.append(f"| {section}{'.' if name else ''}{name} | {value} |")
    return "\n".join(lines)

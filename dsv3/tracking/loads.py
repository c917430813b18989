"""What trackers show of the experts' loads during training: a distribution per layer, and a map per validation.

Both follow from the rows of the training's tables, so that a rebuild shows what the training showed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dsv3.artifacts import REMEDY
from dsv3.errors import UserError, one_line
from dsv3.tracking.events import Distribution, Event, Figure, Heatmap, Row
from dsv3.tracking.metrics import TABLES

CELL = 24
"""Pixels of a cell's side, of which one is the line to the next."""
BALANCED, ABOVE, BELOW, LINE = (247, 247, 247), (213, 94, 0), (0, 114, 178), 128
"""Okabe and Ito's vermilion and blue, which color-blind people tell apart."""
CAPTION = "step {step} · row: MoE layer, column: expert"


class ExpertLoads:
    """The last loads of every layer, from the rows that were written so far."""

    def __init__(self) -> None:
        self._by_layer: dict[int, list[float]] = {}

    def events(self, row: Row) -> Iterator[Event]:
        """Yield what is to be shown after a row: of the router's table, or of the validation's."""
        step, context = int(row.cells["step"]), {"subset": TABLES["router"].subset}
        if "load_shares" in row.cells:
            layer = int(row.cells["layer"])
            self._by_layer[layer] = [float(share) for share in str(row.cells["load_shares"]).split()]
            yield Distribution("load_share", self._by_layer[layer], step, {**context, "layer": layer})
        elif row.table == "validation" and self._by_layer:
            loads = [self._by_layer[layer] for layer in sorted(self._by_layer)]
            yield Heatmap("load_map", loads, CAPTION.format(step=step), step, context)


def picture(event: Figure | Heatmap) -> Image.Image:
    """Return what the event shows, in RGB."""
    if isinstance(event, Figure):
        try:
            return Image.open(event.path).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, by what is wrong
            raise UserError(f"{event.path}: is no picture ({one_line(error)}); {REMEDY}") from None
    return Image.fromarray(pixels(event.rows))


def pixels(rows: Sequence[Sequence[float]]) -> Any:
    """Return loads, a row per layer and a column per expert, as an array of bytes: height, width, RGB."""
    loads = np.asarray(rows, dtype=np.float64)
    mean = np.maximum(loads.mean(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    excess = np.clip(loads / mean - 1, -1, 1)[..., None]
    balanced, above, below = (np.array(color, dtype=np.float64) for color in (BALANCED, ABOVE, BELOW))
    colors = balanced + np.abs(excess) * (np.where(excess > 0, above, below) - balanced)
    picture = colors.round().astype(np.uint8).repeat(CELL, axis=0).repeat(CELL, axis=1)
    picture[CELL - 1 :: CELL] = picture[:, CELL - 1 :: CELL] = LINE
    return picture

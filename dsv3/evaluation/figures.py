"""The figures of `evaluate`: PNG files whose bytes depend on the numbers (and matplotlib's version) alone.

The colors are Okabe and Ito's and the PuOr map, which remain distinguishable under common color blindness.

Letters: S positions, L layers, E n_routed_experts
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from dsv3.artifacts import replacing

Floats = npt.NDArray[np.float64]

BLUE, VERMILION = "#0072B2", "#D55E00"
DPI = 150
MAX_ANNOTATED_EXPERTS = 16
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, without version or date in it, atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})


def loss_by_position(loss_S: Floats, mean: float, title: str) -> Figure:
    """Return the curve of the loss over the number of context tokens, with `mean`, the score of the split."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        context = np.arange(1, len(loss_S) + 1)
        axes.plot(context, loss_S, color=BLUE, alpha=0.3, linewidth=0.8, label="each position")
        edges = np.unique(np.geomspace(1, len(loss_S) + 1, num=25).astype(int))
        middles = [np.sqrt(low * (high - 1)) for low, high in pairwise(edges)]
        means = [loss_S[low - 1 : high - 1].mean() for low, high in pairwise(edges)]
        axes.plot(middles, means, color=BLUE, linewidth=2, marker="o", markersize=3, label="mean of neighbours")
        axes.axhline(
            mean, color=VERMILION, linestyle="--", linewidth=1.5, label=f"score with sliding window: {mean:.3f}"
        )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(
            xlabel="tokens of context (the predicted token's place in its window)", ylabel="loss in nats per token"
        )
        axes.set_title(title, loc="left")
        axes.legend(facecolor="white", edgecolor="none", framealpha=0.9)
        return figure


def expert_load(counts: dict[int, Floats], title: str) -> Figure:
    """Return a heat map, layers by experts, of each expert's load relative to an even share (1 = balanced)."""
    relative_LE = np.stack([load_E / load_E.mean() for load_E in counts.values()])
    num_layers, num_experts = relative_LE.shape
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        size = (min(3 + 0.55 * num_experts, 14), min(1.6 + 0.42 * num_layers, 12))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        # White is balanced. The scale reaches at least 2, so that noise does not look like imbalance.
        norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, float(relative_LE.max())))
        image = axes.imshow(relative_LE, cmap="PuOr_r", norm=norm, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(num_layers), [str(layer) for layer in counts])
        if num_experts <= MAX_ANNOTATED_EXPERTS:
            axes.set_xticks(range(num_experts))
            for (layer, expert), value in np.ndenumerate(relative_LE):
                is_dark = abs(norm(value) - 0.5) > 0.35
                axes.text(
                    expert, layer, f"{value:.2f}", ha="center", va="center", color="white" if is_dark else "black"
                )
        axes.set(xlabel="expert", ylabel="layer")
        axes.set_title(title, loc="left")
        figure.colorbar(image, ax=axes, label="load / even share")
        return figure

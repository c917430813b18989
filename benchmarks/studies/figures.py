"""The figures of the studies. Every seed can be seen; colours are Okabe and Ito's, and never the only difference."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.studies.definition import Study
from benchmarks.studies.report import emulated, finished
from benchmarks.studies.results import Result
from benchmarks.studies.scaling import can_fit, fit, runs_of
from benchmarks.studies.statistics import mean_curve, of_variant, pairs, relative_gap
from dsv3.evaluation.figures import BLUE, STYLE, VERMILION
from dsv3.statistics import Sample

GREEN = "#009E73"
MARKERS = "osD^vP"
SPREAD = 0.5
"""Height over which the seeds of a row are spread; rows are 1 apart."""

LINEAR_NATS = 0.02
"""Differences up to here are drawn to scale."""


def figure(study: Study, results: Sequence[Result]) -> Figure:
    """Return the study's figure."""
    with mpl.rc_context(STYLE):
        return {"dots": dots, "curves": curves, "law": law}[study.figure](study, results)


def dots(study: Study, results: Sequence[Result]) -> Figure:
    """Return, per variant, each seed's difference to the baseline, their mean and its interval; and MaxVio."""
    variants = [variant for variant in finished(study, results) if variant != study.baseline]
    shown = [study.baseline, *variants]
    figure = Figure(figsize=(9.6, 1.6 + 0.42 * len(shown)), layout="constrained")
    loss, vio = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for row, variant in enumerate(shown):
        both = pairs(results, variant, study.baseline)
        if variant != study.baseline:
            _row(loss, row, {own.seed: own.nats_per_char - other.nats_per_char for own, other in both}, study)
        _row(vio, row, {own.seed: own.max_vio for own in of_variant(results, variant)}, study)
    for axes in (loss, vio):
        axes.axvline(0, color="black", linewidth=1)
    loss.set_yticks(range(len(shown)), shown)
    loss.set_ylim(len(shown) - 0.5, -0.5)
    loss.set_xscale("symlog", linthresh=LINEAR_NATS, linscale=2)  # one bad variant would press the others onto zero
    loss.set_xlabel(
        f"held-out loss minus {study.baseline}'s of the same seed,\nnats/char; logarithmic beyond ± {LINEAR_NATS:g}"
    )
    loss.set_title("← better   |   worse →", fontsize=10)
    vio.set_xlabel("MaxVio of the worst layer,\nheld-out text; not paired")
    vio.set_title("← even   |   uneven →", fontsize=10)
    for seed, marker in zip(study.seeds, MARKERS, strict=False):
        vio.plot([], [], marker, color=BLUE, markersize=5, label=f"seed {seed}")
    vio.plot([], [], "|-", color=VERMILION, markersize=14, markeredgewidth=2, label="mean, 95 % interval")
    figure.legend(*vio.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _row(axes: Axes, row: int, by_seed: dict[int, float], study: Study) -> None:
    """Draw each seed's value, and above them their mean and its interval."""
    if not by_seed:
        return
    sample = Sample(tuple(by_seed.values()))
    if sample.half_interval is not None:
        axes.plot([sample.mean], [row], "|", color=VERMILION, markersize=14, markeredgewidth=2, zorder=3)
        axes.errorbar(sample.mean, row, xerr=sample.half_interval, color=VERMILION, linewidth=1.5, capsize=3, zorder=2)
    for seed, value in by_seed.items():
        number = study.seeds.index(seed)
        shift = SPREAD * (number / max(1, len(study.seeds) - 1) - 0.5)  # so that equal values don't hide each other
        marker = MARKERS[number % len(MARKERS)]
        axes.plot([value], [row + shift], marker, color=BLUE, markersize=5, alpha=0.8, zorder=4)


def curves(study: Study, results: Sequence[Result]) -> Figure:
    """Return the validation loss of each variant, and the relative gap of its smoothed training loss by seed."""
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    loss, gap = figure.subplots(1, 2)
    looks: list[dict[str, Any]] = [
        {"color": "black", "linestyle": ":", "marker": "o"},
        {"color": BLUE, "linestyle": "--", "marker": "s"},
        {"color": VERMILION, "linestyle": "-", "marker": "^"},
        {"color": GREEN, "linestyle": "-.", "marker": "D"},
    ]
    styles = dict(zip(study.variants, looks, strict=False))
    for variant in finished(study, results):
        style = styles[variant]
        label = variant + emulated(of_variant(results, variant))
        mean = mean_curve([result.validation_losses for result in of_variant(results, variant)])
        loss.plot(list(mean), list(mean.values()), label=label, markersize=4, fillstyle="none", **style)
        gaps = [relative_gap(own, other) for own, other in pairs(results, variant, study.baseline)]
        if variant != study.baseline and gaps:
            for one in gaps:
                gap.plot(list(one), list(one.values()), color=style["color"], linewidth=0.7, alpha=0.45)
            mean = mean_curve(gaps)
            gap.plot(list(mean), list(mean.values()), color=style["color"], linestyle=style["linestyle"], label=label)
    if study.goal_percent is not None:
        goal = study.goal_percent
        gap.axhspan(-goal, goal, color="#eeeeee", zorder=0, label=f"goal: ± {goal:g} %")
    gap.axhline(0, color="black", linewidth=1)
    loss.set(xlabel="step", ylabel="validation loss, nats/token", title="Mean over the seeds")
    gap.set(
        xlabel="step", ylabel=f"training loss, gap to {study.baseline}, %", title="Each seed (thin), and their mean"
    )
    for axes in (loss, gap):
        axes.legend(facecolor="white", edgecolor="none", framealpha=0.9)
    return figure


def law(study: Study, results: Sequence[Result]) -> Figure:
    """Return each run's loss against the tokens it read, and the fitted law as a line per size."""
    runs = runs_of(results)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    fitted = fit(runs) if can_fit(runs) else None
    for number, size in enumerate(np.unique(runs.parameters)):
        own = runs.take(runs.parameters == size)
        color, marker = (BLUE, VERMILION, GREEN, "black")[number % 4], MARKERS[number % len(MARKERS)]
        label = f"N = {size / 1e6:.2f} million"
        axes.plot(own.tokens / 1e6, own.loss, marker, color=color, fillstyle="none", markersize=5, label=label)
        if fitted is not None:
            tokens = np.geomspace(runs.tokens.min(), runs.tokens.max(), 100)
            loss = fitted.loss(np.full_like(tokens, size), tokens, np.full_like(tokens, own.unique_tokens[0]))
            axes.plot(tokens / 1e6, loss, color=color, linewidth=1)
    axes.set(xscale="log", xlabel="tokens read, millions", ylabel="held-out loss, nats/char", title="Lines: the law")
    lengths = np.unique(runs.tokens) / 1e6
    axes.set_xticks(lengths, [f"{length:.2g}" for length in lengths])
    axes.set_xticks([], minor=True)
    axes.axvline(runs.unique_tokens[0] / 1e6, color="grey", linewidth=0.8, linestyle=":", label="the text once")
    axes.legend(facecolor="white", edgecolor="none", framealpha=0.9)
    return figure

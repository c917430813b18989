"""Draw the schedules for docs/schedules.md, from the functions that the training calls.

    python -m benchmarks.schedules

The settings are the report's (section 4.2), with params.yaml's peak rate; the budget is a thousand steps of the whole
batch, ramped up in five levels.
"""

import re
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3.artifacts import check_replaceable_file
from dsv3.cli import ParamsOption, command
from dsv3.evaluation.figures import BLUE, STYLE, VERMILION, save_figure
from dsv3.params.read import read_params
from dsv3.params.train import TrainParams
from dsv3.training.budget import Budget, budget_of
from dsv3.training.schedule import COSINE_UNTIL, bias_update_rate, learning_rate, mtp_loss_weight

REPORT = {
    "lr_scheduler_type": "deepseek_v3",
    "warmup_ratio": 0.02,
    "gradient_accumulation_steps": 5,
    "batch_ramp_levels": 5,
    "batch_ramp_ratio": 0.469 / 14.8,
    "bias_freeze_ratio": 1 - COSINE_UNTIL,
    "max_steps": -1,
    "num_train_epochs": 1.0,
}
STEPS = 1000
OTHERS = {"cosine": "--", "linear": ":"}
"""Schedulers drawn beside the report's."""


def curves(params: TrainParams) -> Figure:
    """Return a figure of the four schedules over the share of the tokens."""
    budget = budget_of(params, STEPS * params.gradient_accumulation_steps * params.per_device_train_batch_size)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        rates, batch, bias, weight = figure.subplots(2, 2).flat
        draw_rates(rates, params, budget)
        shares = [100 * budget.share(step) for step in range(budget.total_steps)]
        sizes = [(budget.starts[step + 1] - budget.starts[step]) / 5 for step in range(budget.total_steps)]
        batch.step(shares, sizes, where="post", color=BLUE)
        batch.set(title="batch, as a share of its full size", xlim=(0, 8), ylim=(0, 1.1))
        bias.plot(shares, [bias_update_rate(step, params, budget) for step in range(len(shares))], color=BLUE)
        bias.set(title="γ, step of the routers' bias", ylim=(0, None))
        weight.plot(shares, [mtp_loss_weight(step, params, budget) for step in range(len(shares))], color=BLUE)
        weight.set(title="λ, weight of the multi-token prediction loss", ylim=(0, None))
        for axes in (rates, batch, bias, weight):
            axes.set_xlabel("% of the training tokens")
            axes.title.set_size(10)
        return figure


def draw_rates(axes: Axes, params: TrainParams, budget: Budget) -> None:
    """Draw the learning rate of the report's scheduler, and of the others with the same warm-up."""
    shares = [100 * budget.share(step) for step in range(budget.total_steps)]
    for name, line in {"deepseek_v3": "-", **OTHERS}.items():
        own = params.model_copy(update={"lr_scheduler_type": name})
        colour = BLUE if name == "deepseek_v3" else VERMILION
        ratios = [learning_rate(step, own, budget) / params.learning_rate for step in range(len(shares))]
        axes.plot(shares, ratios, line, color=colour, label=name)
    axes.set(title="learning rate, as a share of its peak", ylim=(0, 1.1))
    axes.legend(loc="lower center", facecolor="white", edgecolor="none", framealpha=0.9)


def main(
    params: ParamsOption = Path("params.yaml"),
    output: Annotated[Path, typer.Option(help="The picture to write.")] = Path("docs/figures/schedules.png"),
) -> None:
    """Draw the schedules."""
    check_replaceable_file(output, re.compile(rb"\x89PNG"), "PNG")
    train = read_params(params).train
    save_figure(curves(TrainParams(**{**train.model_dump(), **REPORT})), output)
    print(output)


if __name__ == "__main__":
    command(main)

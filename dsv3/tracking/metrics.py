"""Which numbers a run records: one name, one unit, one meaning, in every table, metrics.json and tracker.

A row, or a later stage's result, with a name that is not listed here is refused by the recorder, so that two runs can
always be compared. What tells a number of the training split from one of the validation split is not its name but its
table (in Aim: the context's `subset`).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar, cast

from dsv3.scores import SCORES

T = TypeVar("T")

Cell = int | float | str
"""What stands in a table: numbers, and in index columns names."""


@dataclass(frozen=True)
class Metric:
    """One recorded column: its unit ("" for counts and ratios) and what it says."""

    unit: str
    description: str
    is_text: bool = False
    """Whether it is a name, or several numbers, instead of a number: never a curve."""


@dataclass(frozen=True)
class Table:
    """One TSV file of a run: its index columns, and the part of the data that its rows speak about."""

    index: tuple[str, ...]
    subset: str


METRICS = MappingProxyType(
    {
        # Where in the run
        "step": Metric("", "optimizer steps done"),
        "layer": Metric("", "decoder layer, counted from 0; MTP modules follow the main ones"),
        "module": Metric("", "module with FP8 products; `model` is all of them together", is_text=True),
        "operand": Metric(
            "", "input, gradient (by the output), weight; of routed experts gate_up and down", is_text=True
        ),
        "epoch": Metric("", "passes over the training tokens"),
        "tokens_seen": Metric("tokens", "training tokens consumed so far"),
        # Losses, always natural logarithms
        "loss": Metric("nats/token", "cross-entropy of the next token, without any auxiliary loss"),
        "total_loss": Metric(
            "nats/token", "what is minimized: loss (and teachers') + weighted MTP and sequence-wise losses"
        ),
        "mtp_loss": Metric("nats/token", "cross-entropy of multi-token prediction, mean over its depths"),
        "sequence_loss": Metric("", "sequence-wise balance loss before its weight"),
        "best_loss": Metric("nats/token", "lowest validation loss so far"),
        "best_step": Metric("", "step of the lowest validation loss"),
        **{name: Metric(score.unit, score.description) for name, score in SCORES.items()},
        "tokens": Metric("tokens", "tokens that were scored"),
        "characters": Metric("characters", "characters that the scored tokens spell"),
        "bytes": Metric("bytes", "bytes that the scored tokens spell"),
        "position": Metric("tokens", "place of a token in its window, counted from 0"),
        # Multi-token prediction as a means to write faster
        "mtp_acceptance": Metric(
            "", "share of held-out tokens where an MTP module, and all before it, say what the model itself says"
        ),
        "draft_acceptance": Metric("", "share of the MTP modules' drafts that were kept in writing"),
        "tokens_per_pass": Metric("tokens", "tokens written per forward pass of the main model; 1 without drafts"),
        # Schedules
        "learning_rate": Metric("", "learning rate of the step"),
        "bias_update_rate": Metric("", "gamma of loss-free balancing"),
        "mtp_loss_weight": Metric("", "lambda of multi-token prediction"),
        "grad_norm": Metric("", "norm of all gradients before clipping"),
        # Routing (one layer's experts)
        "max_vio": Metric("", "(largest load - mean load) / mean load, over the batches since the last row"),
        "max_vio_batch": Metric("", "the same within one optimizer step's batch, mean since the last row"),
        "max_vio_global_mean": Metric("", "the same over the whole held-out text, mean over the layers"),
        "max_vio_global_max": Metric("", "the same over the whole held-out text, largest of the layers"),
        "entropy": Metric("nats", "entropy of the load's distribution over the experts; ln(experts) when balanced"),
        "entropy_mean": Metric("nats", "the same over the whole held-out text, mean over the layers"),
        "num_layers": Metric("", "layers whose experts got tokens, MTP modules among them"),
        "dead_experts": Metric("", "experts that received no token"),
        "bias_min": Metric("", "smallest routing bias"),
        "bias_max": Metric("", "largest routing bias"),
        "load_share": Metric("", "share of a layer's routed tokens that went to an expert; 1 / experts when balanced"),
        "load_shares": Metric("", "the same since the last row, of each of the layer's experts in order", is_text=True),
        "expert": Metric("", "routed expert, counted from 0"),
        # FP8 (one operand of one module, on one micro-batch)
        "underflow_share": Metric("", "share of the numbers that become zero in FP8"),
        "saturation_share": Metric("", "share of the numbers stored at the end of the range; 1/128 or a little more"),
        "outlier_block_share": Metric("", "share of the blocks whose largest number is 8 times their rms or more"),
        "relative_error": Metric("", "norm of the rounding error / norm of the operand"),
        "nonzero_grad_share": Metric(
            "", "share of a weight's gradient that is not zero; experts without tokens left out"
        ),
        # Speed and memory
        "step_s": Metric("s", "wall-clock time of one optimizer step, mean since the last row"),
        "tokens_per_s": Metric("tokens/s", "training tokens per second of wall-clock time"),
        "model_flops_per_s": Metric("FLOP/s", "the model's arithmetic per second, recomputation not counted"),
        "peak_memory_bytes": Metric("bytes", "peak memory of the device (CPU: resident memory of the process)"),
        "train_s": Metric("s", "wall-clock time of the training, resumed parts included"),
    }
)

OLDER_NAMES = MappingProxyType({"load": "load_share", "loads": "load_shares"})
"""Names of columns in results and checkpoints of before 2026-11-27, and what they are called now."""

WHOLE_MODEL = "model"
"""Module under which the sums over all modules with FP8 products are recorded; every module's name begins with it."""

TABLES = MappingProxyType(
    {
        "history": Table(index=("step",), subset="train"),
        "validation": Table(index=("step",), subset="val"),
        "router": Table(index=("step", "layer"), subset="train"),
        "fp8": Table(index=("step", "module", "operand"), subset="train"),
    }
)
"""The tables that `train` writes, each to `<name>.tsv`."""


@dataclass(frozen=True)
class Headline:
    """How one of the few numbers by which runs are compared is shown."""

    label: str
    """What it is, with its unit."""
    format: str
    """A format specification, without a sign."""


HEADLINE: Mapping[str, Headline] = MappingProxyType(
    {
        "heldout": Headline("held-out nats/char", ".4f"),
        "val_loss": Headline("validation nats/token", ".4f"),
        "tokens_s": Headline("tokens/s", ",.0f"),
        "minutes": Headline("minutes of training", ".1f"),
        "max_vio": Headline("MaxVio, held-out", ".3f"),
        "dead_experts": Headline("dead experts", ".4g"),
        "parameters": Headline("parameters", ",.0f"),
    }
)
"""What the stages' headline.json hold, DVC's metrics: MaxVio of the worst layer, tokens/s the median, the validation
loss the last one. The names are short, for the table of `dvc exp show`; all other numbers are in metrics.json."""


def place(table: str, row: Mapping[str, Cell]) -> dict[str, int | str]:
    """Return what tells the row's curves from others of the same name: its index without the step."""
    others = [name for name in TABLES[table].index if name != "step"]
    return {name: str(row[name]) if METRICS[name].is_text else int(row[name]) for name in others}


def curve_names(table: str, row: Mapping[str, Cell]) -> dict[str, float]:
    """Return the row's numbers under `<subset>/<name>`, with `/layer_<i>`, or `/<module>/<operand>`, behind it."""
    parts = [value if isinstance(value, str) else f"{name}_{value}" for name, value in place(table, row).items()]
    subset = TABLES[table].subset
    return {"/".join([subset, name, *parts]): float(row[name]) for name in numbers(table, row)}


def numbers(table: str, row: Mapping[str, Cell]) -> list[str]:
    """Return the names of the row's cells that are points of curves."""
    return [name for name in row if name not in TABLES[table].index and not METRICS[name].is_text]


def renamed(row: Mapping[str, T]) -> dict[str, T]:
    """Return a row of older results under the names of today."""
    return {OLDER_NAMES.get(name, name): cell for name, cell in row.items()}


def unknown_names(names: Iterable[str]) -> list[str]:
    """Return those of `names` that are not in the vocabulary, sorted."""
    return sorted(set(names) - set(METRICS))


def names_of(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of a metrics.json's values; what only groups them (a split, `mtp`, a depth) is no name."""
    for name, value in result.items():
        if isinstance(value, Mapping):
            yield from names_of(cast(Mapping[str, Any], value))
        else:
            yield name

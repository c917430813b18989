"""How a training step's time and memory grow with batch, block, layers and experts, and what the sizing stage predicts.

Each point is a process of its own: it reads its memory, builds the model, does a few optimizer steps, and reports the
median time of a step and by how much its peak of resident memory has risen. The prediction is that of `estimate_size`
for the same training on a CPU. Then a straight line is laid through the times over the tokens of a step.

    python -m benchmarks.growth                                 nano, minutes
    python -m benchmarks.growth --config mini_model/config_tiny.json --batches 1,2 --blocks 256 --layers "" --experts ""

The resident peak has parts that no formula counts: what libraries allocate at their first call, and freed memory that
the allocator keeps. So the growth from the first point is compared with the predicted growth as well.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.results import Cell, JsonOption, Result, Table, publish
from benchmarks.timing import conditions
from benchmarks.train_step import Setting, our_step
from dsv3.artifacts import read_json, write_json
from dsv3.cli import ParamsOption, command
from dsv3.params.architecture import Architecture, read_architecture
from dsv3.params.read import read_params
from dsv3.sizing.memory import training_memory

ROOT = Path(__file__).parent.parent
MEBIBYTE = 1 << 20
STATUS = Path("/proc/self/status")
"""What Linux says of a process; elsewhere time alone is measured."""
MEASURED = {
    "precision": "fp32",
    "use_fp8": False,
    "adam_moments_dtype": "fp32",
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "hidden_dropout": 0.0,
    "ema_decay": 0.0,
    "teachers": [],
}
"""Parameters of the training that is measured (`benchmarks.train_step`), and so of the one that is predicted."""


@dataclass(frozen=True)
class Point:
    """What one process trains."""

    config: str
    batch: int
    block: int
    layers: int
    experts: int
    optim: str
    steps: int
    params: str
    """The file of the parameters."""

    def architecture(self) -> dict[str, Any]:
        """Return the content of the model's configuration."""
        changes = {"num_hidden_layers": self.layers, "n_routed_experts": self.experts}
        return {**read_json(Path(self.config)), **changes}

    def predicted_bytes(self) -> int:
        """Return the peak that the sizing stage predicts."""
        sizes = {"per_device_train_batch_size": self.batch, "block_size": self.block, "optim": self.optim}
        params = read_params(Path(self.params)).train.model_copy(update={**sizes, **MEASURED})
        return training_memory(Architecture(**self.architecture()), params, "cpu").peak_bytes


def memory_bytes(name: str) -> int | None:
    """Return `VmRSS` or `VmHWM` (its peak) of this process."""
    if not STATUS.is_file():
        return None
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def trained(point: Point) -> dict[str, float | int | None]:
    """Return the median seconds of a step, the first one left out, and by how many bytes the peak has risen."""
    with TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        write_json(config, point.architecture())
        before, times = memory_bytes("VmRSS"), []
        setting = Setting(config, point.batch, point.block, "fp32", False, False, torch.device("cpu"))
        step = our_step(setting, point.optim)
        for _ in range(point.steps + 1):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    peak = memory_bytes("VmHWM")
    risen = None if before is None or peak is None else peak - before
    return {"seconds": statistics.median(times[1:]), "bytes": risen}


def measured(points: Sequence[Point], threads: int) -> list[dict[str, float | int | None]]:
    """Return what each point's own process found."""
    words = [sys.executable, "-m", "benchmarks.growth", "--threads", str(threads), "--point"]
    found = []
    for point in points:
        done = subprocess.run([*words, json.dumps(asdict(point))], cwd=ROOT, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def axes(base: Point, values: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Point]]:
    """Yield the points along each axis: its name, and `base` with another value of it."""
    for name, steps in values.items():
        yield from ((name, Point(**{**asdict(base), name: value})) for value in steps)


def r_squared(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the share of the variance of `y` that a straight line over `x` explains."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + intercept)
    return float(1 - residual.var() / np.asarray(y).var())


def rows(named: Sequence[tuple[str, Point]], found: Sequence[Mapping[str, float | int | None]]) -> list[list[Cell]]:
    """Return a row per point: time per step, and measured, predicted and compared memory."""
    table: list[list[Cell]] = []
    first = {axis: (point.predicted_bytes(), result["bytes"]) for (axis, point), result in _firsts(named, found)}
    for (axis, point), result in zip(named, found, strict=True):
        predicted, measured_bytes = point.predicted_bytes(), result["bytes"]
        of_predicted = of_growth = None
        if measured_bytes is not None:
            of_predicted = measured_bytes / predicted
            start, start_bytes = first[axis]
            of_growth = (measured_bytes - (start_bytes or 0)) / (predicted - start) if predicted != start else None
        size = None if measured_bytes is None else round(measured_bytes / MEBIBYTE, 1)
        cells = [round(predicted / MEBIBYTE, 1), of_predicted, of_growth]
        table.append([f"{axis} {getattr(point, axis)}", point.batch * point.block, result["seconds"], size, *cells])
    return table


def _firsts(
    named: Sequence[tuple[str, Point]], found: Sequence[Mapping[str, float | int | None]]
) -> Iterator[tuple[tuple[str, Point], Mapping[str, float | int | None]]]:
    """Yield the first point of each axis, with what was found."""
    seen: set[str] = set()
    for pair, result in zip(named, found, strict=True):
        if pair[0] not in seen:
            seen.add(pair[0])
            yield pair, result


def line_table(named: Sequence[tuple[str, Point]], found: Sequence[Mapping[str, float | int | None]]) -> Table:
    """Return how well a straight line over the tokens of a step explains its time."""
    lines: list[list[Cell]] = []
    for axis in ("batch", "block"):
        times = [
            (point.batch * point.block, float(result["seconds"] or 0))
            for (name, point), result in zip(named, found, strict=True)
            if name == axis
        ]
        if len({tokens for tokens, _ in times}) > 2:
            lines.append([f"tokens, by {axis}", r_squared(*zip(*times, strict=True))])
    return Table("A straight line through the times of a step", ["", "R²"], lines)


def numbers(text: str) -> list[int]:
    """Return the numbers of an option's list; none for an empty one."""
    return [int(word) for word in text.split(",") if word.strip()]


def main(  # noqa: PLR0913 (options)
    config: Annotated[Path, typer.Option(help="The model's config.json.")] = ROOT / "mini_model/config_nano.json",
    batches: Annotated[str, typer.Option(help="Sequences in a step, with 256 tokens each.")] = "2,4,8,16",
    blocks: Annotated[
        str, typer.Option(help="Tokens in a sequence, with the first number of sequences.")
    ] = "128,256,512",
    layers: Annotated[str, typer.Option(help="Layers.")] = "2,3,6",
    experts: Annotated[str, typer.Option(help="Routed experts.")] = "4,8,16",
    optim: Annotated[str, typer.Option(help="Optimizer, by its name in params.yaml.")] = "adamw",
    steps: Annotated[int, typer.Option(help="Timed steps of each point.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of the CPU.")] = 2,
    params: ParamsOption = ROOT / "params.yaml",
    point: Annotated[str | None, typer.Option(help="Train this point (JSON), print what was found, end.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Measure how steps grow."""
    torch.set_num_threads(threads)
    if point is not None:
        print(json.dumps(trained(Point(**json.loads(point)))))
        return
    sizes, first = read_architecture(config), numbers(batches)[0]
    paths = str(config.resolve()), str(params.resolve())
    base = Point(paths[0], first, 256, sizes.num_hidden_layers, sizes.n_routed_experts, optim, steps, paths[1])
    values = {"batch": batches, "block": blocks, "layers": layers, "experts": experts}
    named = list(axes(base, {name: numbers(text) for name, text in values.items()}))
    found = measured([each for _, each in named], threads)
    columns = ["", "tokens", "s per step", "peak MiB", "predicted MiB", "of predicted", "growth, of predicted growth"]
    tables = [Table("A point per process", columns, rows(named, found)), line_table(named, found)]
    setting: dict[str, Cell] = {"model": config.name, "optimizer": optim, "steps": steps, "precision": "fp32"}
    question = "How do time and memory of a training step grow, and are they as predicted?"
    publish(Result(question, conditions(torch.device("cpu")), setting, tables), json_path)


if __name__ == "__main__":
    command(main)

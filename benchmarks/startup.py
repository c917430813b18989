"""How long commands take before they work: `--help` of every stage, and the plan of the light ones.

Each is a process of its own, from its start to its end, beside a bare Python and the imports that the heavy stages
need. `--help` and the light stages import neither torch nor transformers, so they should lie near the bare Python.

    python -m benchmarks.startup
    python -m benchmarks.startup --rounds 1 --only "python;download --help"
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.results import JsonOption, Result, Table, publish
from benchmarks.timing import Cost, conditions, median_ratio, process_cost
from dsv3.cli import command
from dsv3.params.read import read_yaml

ROOT = Path(__file__).parent.parent
STAGES = tuple(read_yaml(ROOT / "dvc.yaml")["stages"])
BASE = "python"
MEBIBYTE = 1 << 20


def commands() -> dict[str, list[str]]:
    """Return what is started, by name; the peers are Python itself and two imports."""
    python = [sys.executable]
    found = {
        BASE: [*python, "-c", "pass"],
        "import torch": [*python, "-c", "import torch"],
        "import transformers": [*python, "-c", "from transformers import AutoModelForCausalLM"],
    }
    found |= {f"{stage} --help": [*python, "-m", f"stages.{stage}", "--help"] for stage in STAGES}
    # the light stage that reads no output of another
    return found | {"estimate_size --dry-run": [*python, "-m", "stages.estimate_size", "--dry-run"]}


def measured(chosen: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Cost]]:
    """Return the costs of each command, a value per round; each ran once before, so that its files are cached."""
    for words in chosen.values():
        process_cost(words, ROOT)
    return {name: list(costs) for name, costs in zip(chosen, zip(*_rounds(chosen, rounds), strict=True), strict=True)}


def _rounds(chosen: Mapping[str, Sequence[str]], rounds: int) -> list[list[Cost]]:
    return [[process_cost(words, ROOT) for words in chosen.values()] for _ in range(rounds)]


def rows(found: Mapping[str, Sequence[Cost]]) -> list[list[str | float | int]]:
    """Return a row per command: medians, and the ratio to the bare Python of the same rounds."""
    base = [cost.wall_s for cost in found[BASE]]
    return [
        [
            name,
            statistics.median(cost.wall_s for cost in costs),
            statistics.median(cost.cpu_s for cost in costs),
            median_ratio([cost.wall_s for cost in costs], base),
            round(statistics.median(cost.peak_bytes for cost in costs) / MEBIBYTE),
        ]
        for name, costs in found.items()
    ]


def main(
    rounds: Annotated[int, typer.Option(help="Starts of each command.")] = 5,
    only: Annotated[str | None, typer.Option(help="Commands, separated by semicolons; default: all.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Time the start of commands."""
    chosen = {name: words for name, words in commands().items() if only is None or name in (BASE, *only.split(";"))}
    columns = ["command", "wall s", "processor s", "wall, of bare Python's", "peak MiB"]
    table = Table("Whole processes, medians", columns, rows(measured(chosen, rounds)))
    question = "How long does a command take before it works?"
    publish(Result(question, conditions(torch.device("cpu")), {"rounds": rounds}, [table]), json_path)


if __name__ == "__main__":
    command(main)

"""How long this project trains to reach the loss that nanoGPT's recipe for a CPU ends with: same text, same split.

For each seed, in turn and in one process: nanoGPT's recipe (benchmarks/nano_gpt.py) to its end, then this project's
training (params.yaml, with so few steps that it ends near the same loss). Timed is the training alone, without reading,
validation and export. Both are scored on the last tenth of the text, in windows that don't overlap, in nats per
character. The ratio of the times says something only where ours ends at nanoGPT's loss or below.

    python -m benchmarks.time_to_loss                           three seeds, minutes; the pipeline must have run once
    python -m benchmarks.time_to_loss --steps 50 --seeds 1
"""

import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate.state import AcceleratorState

from benchmarks.nano_gpt import Recipe, character_ids, nats_per_char
from benchmarks.nano_gpt import train as train_nano_gpt
from benchmarks.quality import scores
from benchmarks.results import Cell, JsonOption, Result, Table, publish
from benchmarks.timing import conditions, median_ratio
from dsv3.cli import ParamsOption, command
from dsv3.data.corpus import TEXT_FILE
from dsv3.errors import UserError
from dsv3.params.read import Params, read_params
from dsv3.training.averaging import averaged_weights
from dsv3.training.interruption import Interruption
from dsv3.training.loop import Run, train
from dsv3.training.plan import read_training_plan
from dsv3.training.setup import prepare_model, prepare_run, start_accelerator

ROOT = Path(__file__).parent.parent
OURS, PEER = "this project", "nanoGPT's recipe"


def nano_gpt_result(text: str, recipe: Recipe, seed: int) -> tuple[float, float]:
    """Return the seconds of training by nanoGPT's recipe, and its loss on the rest of the text."""
    ids, vocab_size = character_ids(text)
    end = int(recipe.train_share * len(ids))
    start = time.perf_counter()
    model = train_nano_gpt(ids[:end], vocab_size, recipe, seed)
    return time.perf_counter() - start, nats_per_char(model, ids[end:], recipe.block)


def shortened(params: Params, steps: int, seed: int) -> Params:
    """Return the parameters of so many steps on the CPU, on one process and without validation in between."""
    training = params.train.model_copy(update={"max_steps": steps, "eval_steps": steps})
    runtime = params.runtime.model_copy(update={"device": "cpu", "num_processes": 1, "trackers": []})
    return params.model_copy(update={"train": training, "runtime": runtime, "seed": seed})


def our_result(params: Params, tokens: Path) -> tuple[float, float]:
    """Return the seconds of training as `params` say, and the loss on the held-out text."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision, unless told to forget it
    plan = read_training_plan(params, tokens)
    accelerator = start_accelerator(plan)
    model, _ = prepare_model(plan, accelerator.device)
    run = prepare_run(plan, accelerator, model, Interruption())
    start = time.perf_counter()
    train(run, [], _no_checkpoint)
    seconds = time.perf_counter() - start
    apart = params.evaluate.model_copy(update={"stride": params.evaluate.block_size})
    with averaged_weights(run.model, run.optimizer):  # what the pipeline exports, where params.yaml asks for averages
        score = scores(run.model.eval(), tokens, apart)["heldout"].metrics()
    return seconds, float(score["nats_per_char"])


def _no_checkpoint(run: Run) -> None:
    raise UserError(f"step {run.state.step}: the training has stopped")


def rows(found: dict[str, list[tuple[float, float]]]) -> list[list[Cell]]:
    """Return a row per contestant: medians, the worst loss, and nanoGPT's time as a multiple."""
    seconds = {name: [pair[0] for pair in pairs] for name, pairs in found.items()}
    losses = {name: [pair[1] for pair in pairs] for name, pairs in found.items()}
    return [
        [
            name,
            statistics.median(seconds[name]),
            statistics.mean(losses[name]),
            max(losses[name]),
            median_ratio(seconds[PEER], seconds[name]),
            sum(own <= other for own, other in zip(losses[name], losses[PEER], strict=True)),
        ]
        for name in found
    ]


def main(  # noqa: PLR0913 (options)
    steps: Annotated[int, typer.Option(help="Optimizer steps of this project's training.")] = 60,
    seeds: Annotated[int, typer.Option(help="Trainings of each.")] = 3,
    peer_steps: Annotated[int, typer.Option(help="Steps of nanoGPT's recipe; 2,000 as published.")] = Recipe.steps,
    corpus: Annotated[Path, typer.Option(help="Folder of the text.")] = ROOT / "data/corpus",
    tokens: Annotated[Path, typer.Option(help="Folder of its tokens.")] = ROOT / "data/tokens",
    params: ParamsOption = ROOT / "params.yaml",
    threads: Annotated[int, typer.Option(help="Threads of the CPU.")] = 2,
    json_path: JsonOption = None,
) -> None:
    """Train by both recipes, and compare."""
    torch.set_num_threads(threads)
    path = corpus / TEXT_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; run dvc repro download tokenize")
    text, parameters = path.read_text(encoding="utf-8"), read_params(params)
    recipe = replace(Recipe(), steps=peer_steps, warmup_steps=min(Recipe.warmup_steps, peer_steps // 2))
    found: dict[str, list[tuple[float, float]]] = {PEER: [], OURS: []}
    for seed in range(seeds):
        found[PEER].append(nano_gpt_result(text, recipe, seed))
        found[OURS].append(our_result(shortened(parameters, steps, parameters.seed + seed), tokens))
    columns = ["", "s of training", "mean nats/char", "worst seed", "times as fast", "seeds at or below nanoGPT's loss"]
    table = Table("Training alone, medians; losses on the last tenth of the text", columns, rows(found))
    published = {
        f"nanoGPT_{name}": value for name, value in asdict(recipe).items() if name in ("steps", "batch", "block")
    }
    setting: dict[str, Cell] = {"seeds": seeds, "our_steps": steps, **published}
    question = "How long does training take to the loss that nanoGPT's recipe for a CPU ends with?"
    publish(Result(question, conditions(torch.device("cpu")), setting, [table]), json_path)


if __name__ == "__main__":
    command(main)

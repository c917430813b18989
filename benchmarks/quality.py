"""What an exported model scores on the held-out text, in every way that numbers are quoted.

The sliding window gives each token context, so it is the better measure; windows that don't overlap are what nanoGPT's
training reports. The held-out tenth is two halves of 5 % (validation, test), which differ by more than most changes of
a recipe: quote both. Stock transformers loads the same folder, and scores the same windows.

    python -m benchmarks.quality                                the pipeline's model; the pipeline must have run once
    python -m benchmarks.quality --model another_model
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks.results import Cell, JsonOption, Result, Table, publish
from benchmarks.timing import best_device, conditions
from dsv3.cli import ParamsOption, command
from dsv3.data.meta import check_shards, open_stream, read_meta
from dsv3.evaluation.sliding_window import SPLITS, PositionLoss, check_fits, positions_of, score_split
from dsv3.export.loading import check_model, load_model
from dsv3.params.evaluate import EvaluateParams
from dsv3.params.read import read_params
from dsv3.scores import SplitScore

ROOT = Path(__file__).parent.parent


def scores(model: PreTrainedModel, tokens: Path, params: EvaluateParams) -> dict[str, SplitScore]:
    """Return the score of each half of the held-out text, and of both."""
    meta = read_meta(tokens)
    found: dict[str, SplitScore] = {}
    position_ids = positions_of(params, meta.bos_token_id)
    for split in SPLITS:
        stream, size = open_stream(tokens, meta, split), meta.splits[split]
        nats = score_split(model, stream, params, PositionLoss.zeros(params.block_size), position_ids=position_ids)
        found[split] = SplitScore(nats, len(stream) - 1, size.characters, size.bytes)
    return found | {"heldout": found["validation"] + found["test"]}


def stock_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """Return the model as transformers' own class loads it, without the folder's code."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return loaded.to(device).eval()


def contestants(
    folder: Path, tokens: Path, params: EvaluateParams, device: torch.device
) -> dict[str, Callable[[], dict[str, SplitScore]]]:
    """Return what gives each way's scores, by name."""
    apart = params.model_copy(update={"stride": params.block_size})
    slide = f"window of {params.block_size}, moved by {params.stride}"
    windows = f"windows of {params.block_size} that don't overlap"
    ours = load_model(folder, device)
    check_fits(ours, read_meta(tokens).model_dump(), params)
    return {
        slide: lambda: scores(ours, tokens, params),
        windows: lambda: scores(ours, tokens, apart),
        f"{windows}, stock transformers": lambda: scores(stock_model(folder, device), tokens, apart),
    }


def row(name: str, found: dict[str, SplitScore]) -> list[Cell]:
    """Return the cells of one way: nats per character of both halves and all, bits per byte of all."""
    ratios = {split: score.metrics() for split, score in found.items()}
    nats = [round(float(ratios[split]["nats_per_char"]), 4) for split in ("heldout", *SPLITS)]
    return [name, *nats, round(float(ratios["heldout"]["bits_per_byte"]), 4)]


def main(
    model: Annotated[Path, typer.Option(help="The exported model.")] = ROOT / "outputs/final_model",
    tokens: Annotated[Path, typer.Option(help="Its token data.")] = ROOT / "data/tokens",
    params: ParamsOption = ROOT / "params.yaml",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_path: JsonOption = None,
) -> None:
    """Score an exported model."""
    check_model(model, tokens)
    logging.set_verbosity_error()  # stock leaves MTP modules out, and says so at length
    target, settings = best_device(device), read_params(params).evaluate
    check_shards(tokens, read_meta(tokens), SPLITS)
    rows = [row(name, score()) for name, score in contestants(model, tokens, settings, target).items()]
    columns = ["", "held-out, nats/char", "validation half", "test half", "held-out, bits/byte"]
    sizes = read_meta(tokens).splits
    setting: dict[str, Cell] = {split: f"{sizes[split].characters:,} characters" for split in SPLITS}
    table = Table("The same model, scored in three ways", columns, rows)
    question = "What does the exported model score on text that it was not trained on?"
    publish(Result(question, conditions(target), setting, [table]), json_path)


if __name__ == "__main__":
    command(main)

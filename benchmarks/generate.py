"""Tokens per second at batch 1, greedy: the sample stage's own decoding beside stock transformers', on the same model.

Each contestant continues the same prompt by the same number of tokens, in turn and in one process; the tokens are
compared. A model with multi-token prediction (MTP) modules is sampled speculatively as well. Then the seed: two texts
drawn with one seed must be equal.

    python -m benchmarks.generate                               the pipeline's model; the pipeline must have run once
    python -m benchmarks.generate --model mtp_model --new-tokens 400
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.results import Cell, JsonOption, Result, Table, publish
from benchmarks.timing import best_device, conditions, median_ratio, paired_s
from dsv3.cli import ParamsOption, command
from dsv3.export.loading import load_model, load_tokenizer
from dsv3.generation.sampling import generate, prompt_tokens
from dsv3.generation.speculative import generate_speculatively
from dsv3.params.read import read_params
from dsv3.params.sample import SampleParams

ROOT = Path(__file__).parent.parent
OURS, STOCK, DRAFTED = "ours", "stock transformers", "ours, speculative"
Write = Callable[[], list[int]]
"""Writes a text; returns its tokens."""


def contestants(folder: Path, ids: Sequence[int], settings: SampleParams, device: torch.device) -> dict[str, Write]:
    """Return what writes each contestant's text, by name."""
    model = load_model(folder, device)
    end = model.config.vocab_size  # no token's id: every text has the same length
    stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, trust_remote_code=False)
    stock = stock.to(device).eval()
    prompt = torch.tensor([list(ids)], device=device)

    def by_stock() -> list[int]:
        found = stock.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=settings.max_new_tokens,
            eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        return found[0, len(ids) :].tolist()

    found: dict[str, Write] = {
        STOCK: by_stock,
        OURS: lambda: generate(model, list(ids), settings, end)[0],
    }
    if model.config.num_nextn_predict_layers:
        found[DRAFTED] = lambda: generate_speculatively(model, list(ids), settings, end)[0]
    return found


def rows(found: dict[str, Write], rounds: int, device: torch.device) -> list[list[Cell]]:
    """Return a row per contestant: speed, ratios in the same rounds, and whether the tokens are stock's."""
    tokens = {name: write() for name, write in found.items()}
    used: dict[str, list[float]] = {name: [] for name in found}
    times = paired_s({name: charged(write, used[name]) for name, write in found.items()}, rounds, device)
    return [
        [
            name,
            len(tokens[name]) / statistics.median(times[name]),
            median_ratio(times[STOCK], times[name]),
            median_ratio(times[OURS], times[name]),
            median_ratio(used[STOCK], used[name]),
            tokens[name] == tokens[STOCK],
        ]
        for name in found
    ]


def charged(write: Write, used: list[float]) -> Write:
    """Return `write`, which then appends the processor's seconds of each call to `used`."""

    def run() -> list[int]:
        start = time.process_time()
        text = write()
        used.append(time.process_time() - start)
        return text

    return run


def is_reproducible(folder: Path, ids: Sequence[int], settings: SampleParams, device: torch.device) -> bool:
    """Return whether two texts drawn with the same seed are equal, and one drawn with another seed is not."""
    model, drawn = load_model(folder, device), settings.model_copy(update={"do_sample": True})
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(generate(model, list(ids), drawn, model.config.vocab_size)[0])
    return texts[0] == texts[1] != texts[2]


def main(  # noqa: PLR0913 (options)
    model: Annotated[Path, typer.Option(help="The exported model.")] = ROOT / "outputs/final_model",
    prompt: Annotated[str, typer.Option(help="What is continued.")] = "ROMEO:\n",
    new_tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 200,
    rounds: Annotated[int, typer.Option(help="Texts of each contestant.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of the CPU.")] = 2,
    params: ParamsOption = ROOT / "params.yaml",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_path: JsonOption = None,
) -> None:
    """Time the decoding of one text."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()  # stock leaves MTP modules out, and says so at length
    target = best_device(device)
    ids = prompt_tokens(load_tokenizer(model), prompt)
    changes = {"do_sample": False, "max_new_tokens": new_tokens, "num_return_sequences": 1, "speculative": False}
    settings = read_params(params).sample.model_copy(update=changes)
    table = Table(
        "One text, greedy, medians",
        ["", "tokens/s", "of stock's", "of ours", "of stock's, by processor time", "stock's tokens"],
        rows(contestants(model, ids, settings, target), rounds, target),
        [f"Sampling is reproducible by its seed: {'yes' if is_reproducible(model, ids, settings, target) else 'no'}."],
    )
    setting = {"prompt_tokens": len(ids), "new_tokens": new_tokens, "rounds": rounds}
    question = "How many tokens per second does the model write, one text at a time?"
    publish(Result(question, conditions(target), cast(dict[str, Cell], setting), [table]), json_path)


if __name__ == "__main__":
    command(main)

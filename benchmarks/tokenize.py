"""The tokenize stage: megabytes per second of a core, and peak memory, over sizes of the text.

The text is the corpus of the pipeline, repeated to each size, so it has few different words; memory for the words of a
larger vocabulary comes on top, with any trainer of byte pairs. The stage is a process of its own: it trains the
tokenizer, encodes, decodes again and compares, and writes the shards. Its peer is the tokenizers library alone, which
trains on, encodes and decodes the same text in a process of its own, and writes nothing.

    python -m benchmarks.tokenize                               1 and 8 MB; the pipeline must have run once
    python -m benchmarks.tokenize --megabytes 100,1000          minutes, and a gigabyte of disk

The speed is that of the additional text of each size over the smallest one, so that starting up does not count.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from benchmarks.results import Cell, JsonOption, Result, Table, publish
from benchmarks.timing import Cost, conditions, process_cost
from dsv3.artifacts import write_json
from dsv3.cli import command
from dsv3.data.corpus import MANIFEST_FILE, TEXT_FILE
from dsv3.errors import UserError

ROOT = Path(__file__).parent.parent
MEGABYTE, MEBIBYTE = 1_000_000, 1 << 20
OURS, PEER = "the stage", "tokenizers alone"
LIBRARY = """
import sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
def parts():
    with open(sys.argv[1], encoding="utf-8", newline="") as file:
        while text := file.read(1 << 16):
            yield text
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator(
    parts(), trainers.BpeTrainer(vocab_size=int(sys.argv[2]), min_frequency=2, initial_alphabet=alphabet)
)
group = []
def flush():
    tokenizer.decode_batch([found.ids for found in tokenizer.encode_batch_fast(group)])
    group.clear()
for part in parts():
    group.append(part)
    if len(group) == 16:
        flush()
flush()
"""


def write_corpus(folder: Path, text: bytes, megabytes: int) -> Path:
    """Write a corpus of about that size, of whole repetitions of `text`; return its folder."""
    folder.mkdir()
    count = max(1, round(megabytes * MEGABYTE / len(text)))
    digest = hashlib.sha256()
    with (folder / TEXT_FILE).open("wb") as file:
        for _ in range(count):
            file.write(text)
            digest.update(text)
    sizes = {"num_documents": 1, "characters": len(text.decode()) * count, "bytes": len(text) * count}
    write_json(
        folder / MANIFEST_FILE, {"source": "benchmark", "file": TEXT_FILE, **sizes, "sha256": digest.hexdigest()}
    )
    return folder


def stage_words(corpus: Path, params: Path) -> list[str]:
    """Return the command that tokenizes `corpus` into a folder beside it."""
    places = {"corpus": corpus, "output": corpus / "tokens", "metrics": corpus / "metrics.json", "params": params}
    options = [word for name, path in places.items() for word in (f"--{name}", str(path))]
    return [sys.executable, "-m", "stages.tokenize", *options]


def measured(text: bytes, sizes: Sequence[int], vocab_size: int) -> Iterator[tuple[str, int, Cost]]:
    """Yield contestant, bytes of text and cost, for each size the stage and its peer in turn."""
    with TemporaryDirectory() as folder:
        for megabytes in sizes:
            corpus = write_corpus(Path(folder) / str(megabytes), text, megabytes)
            size = (corpus / TEXT_FILE).stat().st_size
            yield OURS, size, process_cost(stage_words(corpus, ROOT / "params.yaml"), ROOT)
            peer = [sys.executable, "-c", LIBRARY, str(corpus / TEXT_FILE), str(vocab_size)]
            yield PEER, size, process_cost(peer, ROOT)
            for path in corpus.rglob("*"):
                if path.is_file():
                    path.unlink()


def rows(found: Sequence[tuple[str, int, Cost]]) -> list[list[Cell]]:
    """Return a row per contestant and size; the speed is None for the smallest size."""
    table: list[list[Cell]] = []
    for name in (OURS, PEER):
        own = [(size, cost) for who, size, cost in found if who == name]
        first_size, first = own[0]
        for size, cost in own:
            more = size - first_size
            speeds = [
                round(more / MEGABYTE / (total - start), 3) if more and total > start else None
                for total, start in ((cost.cpu_s, first.cpu_s), (cost.wall_s, first.wall_s))
            ]
            table.append(
                [name, round(size / MEGABYTE, 1), cost.wall_s, cost.cpu_s, *speeds, round(cost.peak_bytes / MEBIBYTE)]
            )
    return table


def ratio_table(table: Sequence[Sequence[Cell]]) -> Table:
    """Return how many times the peer's speed per core the stage reaches at each size."""
    speeds = {(row[0], row[1]): row[4] for row in table}
    found = [
        [f"{size} MB", ours / peer]
        for (name, size), ours in speeds.items()
        if name == OURS and isinstance(ours, float) and isinstance(peer := speeds[PEER, size], float)
    ]
    return Table("Text per second of a core, as a multiple of the library's", ["size", "ratio"], found)


def main(
    megabytes: Annotated[str, typer.Option(help="Sizes of the text, separated by commas.")] = "1,8",
    text: Annotated[Path, typer.Option(help="The text that is repeated.")] = ROOT / "data/corpus/text.txt",
    vocab_size: Annotated[int, typer.Option(help="Of the peer's tokenizer; the stage has params.yaml's.")] = 2048,
    json_path: JsonOption = None,
) -> None:
    """Measure the tokenize stage."""
    if not text.is_file():
        raise UserError(f"{text}: no such file; run dvc repro download, or name another by --text")
    sizes = sorted({int(size) for size in megabytes.split(",")})
    table = rows(list(measured(text.read_bytes(), sizes, vocab_size)))
    columns = ["", "MB", "wall s", "processor s", "MB/s of a core", "MB/s", "peak MiB"]
    tables = [Table("Whole processes; speeds of the text beyond the smallest size", columns, table), ratio_table(table)]
    question = "How fast is a text tokenized, and does memory grow with it?"
    setting: dict[str, Cell] = {"text": text.name, "vocabulary": vocab_size}
    publish(Result(question, conditions(torch.device("cpu")), setting, tables), json_path)


if __name__ == "__main__":
    command(main)

"""Every file that a stage reads, damaged in every way: `python -m tests.stress.damaged`.

A stage refuses a damaged file in one line, or its result is the one of the whole file. Nothing else happens: no
traceback, no other number. (Checkpoints: tests/dsv3/training/test_checkpoint_damage.py.)
"""

import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dsv3.artifacts import sha256_file
from dsv3.data.sources import write_corpus
from dsv3.params.read import read_params
from stages import evaluate, sample, tokenize, train
from tests.damage import DAMAGES
from tests.exported_model import write_exported
from tests.stress.commands import Ending, first_refusal
from tests.stress.fuzz import Report

Files = dict[str, bytes]


class Bench:
    """Inputs of the later stages, and what these make of them while they are whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.whole = folder / "work", folder / "whole"
        text = folder / "text.txt"
        text.write_text("".join(f"To be, or not to be: that is question {n}.\n" for n in range(400)))
        data = {"source": "file", "path": str(text)}
        write_exported(self.whole, data=data, runtime={"trackers": []}, sample={"max_new_tokens": 4})
        parameters = (self.whole / "params.yaml").read_text().replace(str(self.whole), str(self.folder))
        (self.whole / "params.yaml").write_text(parameters)
        (self.whole / ".dvc").mkdir()
        shutil.copytree(self.whole, self.folder)
        write_corpus(read_params(self.folder / "params.yaml").data, self.whole / "corpus", note=str)
        self.expected = {}
        for kind in COMMANDS:
            self.renew()
            self.expected[kind] = self.result(kind)
        for kind, (end, _) in self.expected.items():
            assert end.kind == "accepted", (kind, end.said)

    def result(self, kind: str) -> tuple[Ending, Files]:
        """Run the commands of a kind; return how the first that refuses ended, or the last, and all that they wrote."""
        commands, outputs = COMMANDS[kind]
        with contextlib.chdir(self.folder):
            end = first_refusal(*commands(self.folder), limit_s=60)  # a whole evaluation draws figures
        written = sorted(path for name in outputs for path in (self.folder / name).rglob("*") if path.is_file())
        return end, {str(path.relative_to(self.folder)): sha256_file(path).encode() for path in written}

    def renew(self) -> None:
        """Make all inputs whole, and remove all outputs."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.whole, self.folder)


def tokenizing(f: Path) -> list[tuple]:
    outputs = ("--output", f / "new_tokens", "--metrics", f / "new_metrics" / "metrics.json")
    return [(tokenize.main, "--corpus", f / "corpus", *outputs, *_params(f))]


def training(f: Path) -> list[tuple]:
    inputs = ("--tokens", f / "tokens", "--corpus", f / "corpus", "--sizes", f / "accepted.txt")
    outputs = ("--model", f / "new_model", "--results", f / "new_results")
    return [(train.main, *inputs, *outputs, *_params(f), "--dry-run"), *evaluating(f)[:1]]


def evaluating(f: Path) -> list[tuple]:
    model = ("--model", f / "final_model", "--run", f / "run.json", *_params(f), "--quiet")
    return [
        (evaluate.main, "--tokens", f / "tokens", "--output", f / "new_evaluation", *model),
        (sample.main, "--output", f / "new_samples" / "samples.md", *model),
    ]


def _params(f: Path) -> tuple:
    return "--params", f / "params.yaml"


COMMANDS: dict[str, tuple[Callable[[Path], list[tuple]], tuple[str, ...]]] = {
    "corpus": (tokenizing, ("new_tokens", "new_metrics")),
    "tokens": (training, ("new_evaluation",)),
    "model": (evaluating, ("new_evaluation", "new_samples")),
}
"""Kind of input: the commands that read it, and the folders that they write."""

FILES: dict[str, Callable[[Path], list[Path]]] = {
    "corpus": lambda f: sorted((f / "corpus").iterdir()),
    "tokens": lambda f: [*sorted(p for p in (f / "tokens").rglob("*") if p.is_file()), f / "corpus" / "manifest.json"],
    "model": lambda f: [*sorted(p for p in (f / "final_model").iterdir() if p.is_file()), f / "run.json"],
}


def damaged(path: Path, g: random.Random) -> str:
    """Damage the file in one way: as tests/damage.py does, or at another place; return how."""
    how = g.choice([*DAMAGES, "cut", "flip anywhere", "foreign JSON", "other file", "folder", "zeros"])
    content = path.read_bytes()
    at = g.randrange(max(1, len(content)))
    if how in DAMAGES:
        DAMAGES[how](path)
    elif how == "cut":
        path.write_bytes(content[:at])
    elif how == "flip anywhere":
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << g.randrange(8))]) + content[at + 1 :])
    elif how == "foreign JSON":
        path.write_text(g.choice(["null", "[]", "3", '"x"', "[" * 50_000, '{"a": NaN}', "9" * 5_000]))
    elif how == "other file":
        path.write_bytes(g.choice(sorted(p for p in path.parent.iterdir() if p.is_file())).read_bytes())
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(bytes(len(content)))
    return how


def damage(kind: str, number: int, seed: int, bench: Bench) -> Report:
    """Damage one file of a kind after the other; return what the stages made of it."""
    report = Report()
    for n in range(number):
        g = random.Random(f"{kind} {seed} {n}")
        bench.renew()
        files = FILES[kind](bench.folder)
        path = files[n % len(files)]
        how = damaged(path, g)
        end, written = bench.result(kind)
        found = []
        if end.kind == "refused" and end.said.count("\n") != 1:
            found.append(f"{end.said.count(chr(10))} lines: {end.said[:300]!r}")
        if end.kind == "refused" and not any(name in end.said for name in (path.name, path.parent.name)):
            found.append(f"does not name the file: {end.said[:300]!r}")
        if end.kind == "accepted" and written != bench.expected[kind][1]:
            odd = [name for name in written if written[name] != bench.expected[kind][1].get(name)]
            found.append(f"other results: {', '.join(odd)[:300]}")
        report.add(f"{kind} {n} {path.name} {how}", end, *found)
    return report


def main(
    tokens: Annotated[int, typer.Option(help="Damaged shards, meta.json, tokenizers and manifests.")] = 160,
    corpus: Annotated[int, typer.Option(help="Damaged texts and manifests.")] = 40,
    model: Annotated[int, typer.Option(help="Damaged files of an exported model.")] = 60,
    seed: Annotated[int, typer.Option(help="Of all cases.")] = 0,
) -> None:
    """Damage files; print a line for each fault and a table; exit with status 1 if there is a fault."""
    with tempfile.TemporaryDirectory(prefix="dsv3-damaged-") as name:
        os.environ["DVC_ROOT"] = name
        bench = Bench(Path(name))
        numbers = {"tokens": tokens, "corpus": corpus, "model": model}
        reports = {kind: damage(kind, number, seed, bench) for kind, number in numbers.items()}
    for kind, report in reports.items():
        print(report.line(kind))
    if any(report.faults for report in reports.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

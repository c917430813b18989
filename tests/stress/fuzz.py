"""Damaged inputs of every kind, given to the stages' own commands: `python -m tests.stress.fuzz`.

Each case is a valid input with one change. The stages that read it must refuse it in one line, or accept it for a
reason: every rule in `tests.stress.rules` holds for what is accepted. A traceback, more than five seconds of
computing, a message without its place, and accepted nonsense are faults. The same seed gives the same cases.
"""

import contextlib
import faulthandler
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML

from dsv3.params.section import value_text
from stages import download, estimate_size, evaluate, sample, tokenize, train
from tests.committed import ROOT
from tests.exported_model import write_exported
from tests.stress import mutations, rules
from tests.stress.commands import Ending, ending, first_refusal
from tests.stress.data_inputs import Case, data_case
from tests.stress.mutations import Mutant, Values

REMEDIES = (
    "must ",
    "missing",
    "is no ",
    "did you mean",
    "can't be read",
    "not YAML",
    "not JSON",
    "not CSV",
    "save it",
    "; ",
    "no such",
)
"""A message says with one of these what would be right."""


@dataclass
class Report:
    """What was tried, how it ended, and what went wrong."""

    endings: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def add(self, what: str, end: Ending, *found: str) -> None:
        """Count one case, and note what is wrong with it."""
        self.endings[end.kind] += 1
        self.slowest = max(self.slowest, end.seconds)
        if end.kind in ("traceback", "hang"):
            found = (f"{end.kind}: {end.said[-1500:]}",)
        for fault in found:
            self.faults.append(f"{what}: {fault}")
            print(f"!! {self.faults[-1]}", flush=True)

    def line(self, name: str) -> str:
        """Return the figures in one line."""
        counts = ", ".join(f"{self.endings[kind]:,} {kind}" for kind in ("accepted", "refused", "traceback", "hang"))
        slow = f"slowest {self.slowest:.2f} s"
        return f"{name:14} {self.endings.total():,} cases: {counts}; {len(self.faults)} faults; {slow}"


class Laboratory:
    """A folder with valid inputs of all stages, in which one at a time is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_exported(folder, data={"source": "file", "path": str(folder / "text.txt")}, runtime={"trackers": []})
        (folder / "text.txt").write_text("To be, or not to be: that is the question.\n" * 50)
        (folder / ".dvc").mkdir()  # shared files lie here
        (folder / "sizes").mkdir()
        self.params_text = (folder / "params.yaml").read_bytes()
        self.params: Values = YAML(typ="safe").load(self.params_text.decode())
        self.architecture: Values = json.loads((folder / "config.json").read_text())
        whole = first_refusal(*self.commands(), limit_s=120)  # imports what the stages need
        assert whole.kind == "accepted", whole.said

    def path(self, name: str) -> Path:
        return self.folder / name

    def commands(self) -> list[tuple]:
        """Return the commands that read params.yaml and the architecture, with the options that change nothing."""
        f, params = self.path, ("--params", self.path("params.yaml"))
        model = ("--model", f("final_model"), "--run", f("run.json"), *params, "--dry-run")
        inputs = ("--tokens", f("tokens"), "--corpus", f("corpus"), "--sizes", f("accepted.txt"))
        outputs = ("--model", f("new_model"), "--results", f("results"))
        return [
            (estimate_size.main, "--output", f("sizes"), "--configs", f("sizes"), *params),
            (train.main, *inputs, *outputs, *params, "--dry-run"),
            (evaluate.main, "--tokens", f("tokens"), "--output", f("evaluate"), *model),
            (sample.main, "--output", f("samples.md"), *model),
        ]


def message_faults(end: Ending, name: str, mutant: Mutant) -> list[str]:
    """Return what a refusal lacks: it is one line with the place, the value and what would be right."""
    said, found = end.said, []
    if said.count("\n") != 1 or not said.endswith("\n"):
        found.append(f"{said.count(chr(10))} lines: {said[:300]!r}")
    if len(said) > 1000:
        found.append(f"{len(said)} characters: {said[:200]!r}")
    if not said.rstrip("\n").isprintable():
        found.append(f"unprintable: {said[:200]!r}")
    if name not in said and mutant.key not in said:
        found.append(f"names neither {name} nor {mutant.key}: {said[:200]!r}")
    if mutant.what == "value" and mutant.key not in said:
        found.append(f"does not name {mutant.key} (set to {str(mutant.value)[:40]}): {said[:200]!r}")
    if not any(word in said for word in REMEDIES):
        found.append(f"names no remedy: {said[:200]!r}")
    return found


def value_fault(end: Ending, mutant: Mutant) -> list[str]:
    """Return a line where the refused value of a number or a truth is not in the message."""
    value = mutant.value
    is_of_several = " * " in end.said or " + " in end.said
    if mutant.what != "value" or isinstance(value, str | list | dict) or value is None or is_of_several:
        return []
    ways = {value_text(value)[:20], str(value)[:20]}
    if abs(value) < 1e300:  # a field of floats says 9.223372036854776e+18 of 9223372036854775808
        ways |= {f"{value:g}"[:20], str(float(value))[:20]}
    return (
        []
        if any(way.lower() in end.said.lower() for way in ways)
        else [f"does not show {str(value)[:30]}: {end.said[:200]!r}"]
    )


def fuzzed_params(laboratory: Laboratory, g: random.Random) -> Mutant:
    values, text = laboratory.params, laboratory.params_text
    return g.choices(
        [
            lambda: mutations.changed_value(values, g, yaml_text),
            lambda: mutations.two_values(values, g, yaml_text),
            lambda: mutations.changed_key(values, g, yaml_text),
            lambda: mutations.damaged_bytes(text, g),
            lambda: mutations.encoded_otherwise(text, g),
            lambda: mutations.hostile_yaml(text, g),
            lambda: mutations.not_a_file(g),
        ],
        [8, 3, 3, 2, 2, 2, 0.3],
    )[0]()


def fuzzed_architecture(laboratory: Laboratory, g: random.Random) -> Mutant:
    values, text = laboratory.architecture, mutations.json_text(laboratory.architecture).encode()
    write = mutations.json_text
    return g.choices(
        [
            lambda: mutations.changed_value(values, g, write),
            lambda: mutations.two_values(values, g, write),
            lambda: mutations.changed_key(values, g, write),
            lambda: mutations.damaged_bytes(text, g),
            lambda: mutations.encoded_otherwise(text, g),
            lambda: mutations.hostile_json(text, g),
            lambda: mutations.not_a_file(g),
        ],
        [8, 3, 3, 2, 2, 2, 0.3],
    )[0]()


def yaml_text(values: Any) -> str:
    """Return values as YAML, in the flow style of JSON, which takes every value."""
    return json.dumps(values, ensure_ascii=False).replace("Infinity", ".inf").replace("NaN", ".nan")


def fuzz_params(laboratory: Laboratory, number: int, seed: int) -> Report:
    """Give the stages damaged params.yaml."""
    report = Report()
    for n in range(number):
        mutant = fuzzed_params(laboratory, random.Random(f"params {seed} {n}"))
        mutations.put(mutant, laboratory.path("params.yaml"))
        end = first_refusal(*laboratory.commands())
        report.add(f"params {n} {mutant.what}", end, *params_faults(laboratory, mutant, end))
    mutations.put(Mutant("", laboratory.params_text), laboratory.path("params.yaml"))
    return report


def params_faults(laboratory: Laboratory, mutant: Mutant, end: Ending) -> list[str]:
    """Return what is wrong with how a changed params.yaml was answered."""
    if end.kind == "refused":
        if mutant.is_same:
            return [f"the same parameters are refused: {end.said[:200]!r}"]
        return message_faults(end, "params.yaml", mutant) + value_fault(end, mutant)
    if end.kind == "accepted" and isinstance(mutant.content, bytes):
        values = YAML(typ="safe").load(mutant.content.decode("utf-8-sig"))
        return [
            f"accepted, though not: {rule} ({mutant.key} {str(mutant.value)[:40]})"
            for rule in rules.broken(rules.PARAMS, values, laboratory.params)
        ]
    return [f"accepts {mutant.content}"] if end.kind == "accepted" else []


def fuzz_architectures(laboratory: Laboratory, number: int, seed: int) -> Report:
    """Give the stages damaged architectures."""
    report, path = Report(), laboratory.path("config.json")
    whole = path.read_bytes()
    for n in range(number):
        mutant = fuzzed_architecture(laboratory, random.Random(f"architecture {seed} {n}"))
        mutations.put(mutant, path)
        end = first_refusal(*laboratory.commands()[:2])
        report.add(f"architecture {n} {mutant.what}", end, *architecture_faults(laboratory, mutant, end))
    mutations.put(Mutant("", whole), path)
    return report


def architecture_faults(laboratory: Laboratory, mutant: Mutant, end: Ending) -> list[str]:
    """Return what is wrong with how a changed architecture was answered."""
    if end.kind == "refused":
        if mutant.is_same:
            return [f"the same architecture is refused: {end.said[:200]!r}"]
        return message_faults(end, "config.json", mutant) + value_fault(end, mutant)
    if end.kind != "accepted":
        return []
    if not isinstance(mutant.content, bytes):
        return [f"accepts {mutant.content}"]
    values = json.loads(mutant.content.decode("utf-8-sig"))
    found = rules.broken(rules.ARCHITECTURE, values, laboratory.architecture)
    found += (
        []
        if found
        else rules.broken({"a step of training is finite": rules.trains_a_step}, laboratory.path("config.json"))
    )
    return [f"accepted, though not: {rule} ({mutant.key} {str(mutant.value)[:40]})" for rule in found]


def fuzz_data(laboratory: Laboratory, number: int, seed: int) -> Report:
    """Give the download stage damaged texts, and tokenize what it accepts."""
    report = Report()
    for n in range(number):
        case = data_case(random.Random(f"data {seed} {n}"), laboratory.path("data"))
        values = json.loads(json.dumps(laboratory.params))
        values["data"] |= {"source": "file", "path": "", **case.data}
        laboratory.path("params.yaml").write_bytes(yaml_text(values).encode("utf-8", "surrogatepass"))
        shutil.rmtree(laboratory.path("new_corpus"), ignore_errors=True)
        with contextlib.chdir(laboratory.folder):
            end = ending(
                download.main, "--output", laboratory.path("new_corpus"), "--params", laboratory.path("params.yaml")
            )
        report.add(f"data {n} {case.what}", end, *data_faults(laboratory, case, end))
    mutations.put(Mutant("", laboratory.params_text), laboratory.path("params.yaml"))
    return report


def data_faults(laboratory: Laboratory, case: Case, end: Ending) -> list[str]:
    """Return what is wrong with how a text was read."""
    if end.kind == "refused":
        if case.documents is not None:
            return [f"refused: {end.said[:200]!r}"]
        place = next((part for part in ("data.", Path(case.data["path"]).name) if part in end.said), None)
        return message_faults(end, "data" if place is None else place, Mutant("", ""))
    if end.kind != "accepted":
        return []
    if case.must_be_refused:
        return [f"accepted: {end.said[:200]!r}"]
    return corpus_faults(laboratory.path("new_corpus"), case) + tokens_faults(laboratory)


def corpus_faults(corpus: Path, case: Case) -> list[str]:
    """Return what is wrong with a corpus that was written."""
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    content = (corpus / manifest["file"]).read_bytes().decode()
    is_text = manifest["file"] == "text.txt"
    documents = [content] if is_text else [json.loads(line)["text"] for line in content.split("\n")[:-1]]
    holds = {
        "the manifest counts characters": manifest["characters"] == sum(map(len, documents)),
        "the manifest counts documents": manifest["num_documents"] == len(documents),
        "no document is empty or begins with a byte order mark": all(d and d[0] != "\ufeff" for d in documents),
        "the documents are those of the file": case.documents is None or sorted(documents) == sorted(case.documents),
        "no document is another's": case.known is None or set(documents) <= case.known,
        "a link that leads out is recorded": ("outside" in documents) == ("num_linked" in manifest["origin"]),
    }
    return [f"accepted, though not: {sentence}" for sentence, is_so in holds.items() if not is_so]


def tokens_faults(laboratory: Laboratory) -> list[str]:
    """Return what is wrong with tokenizing the corpus that was written."""
    f = laboratory.path
    outputs = ("--output", f("new_tokens"), "--metrics", f("new_tokens.json"), "--params", f("params.yaml"))
    end = ending(tokenize.main, "--corpus", f("new_corpus"), *outputs)
    if end.kind == "accepted":
        exact = json.loads(f("new_tokens.json").read_text())["round_trip_exact"]
        return [] if exact else ["accepted, though its tokens spell another text"]
    return [] if end.kind == "refused" and end.said.count("\n") == 1 else [f"tokenize: {end.kind}: {end.said[-800:]}"]


def fuzz_processes(laboratory: Laboratory, number: int, seed: int) -> Report:
    """Run a sample of the damaged params.yaml through real processes: status and message are those seen in process."""
    report = Report()
    path = laboratory.path("params.yaml")
    for n in range(number):
        mutant = fuzzed_params(laboratory, random.Random(f"params {seed} {n}"))
        mutations.put(mutant, path)
        command = laboratory.commands()[0]
        end = ending(*command)
        mutations.put(mutant, path)
        words = [sys.executable, "-m", "stages.estimate_size", *map(str, command[1:])]
        begin = time.perf_counter()
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        real = Ending(
            {0: "accepted", 2: "refused"}.get(done.returncode, "traceback"), done.stderr, time.perf_counter() - begin
        )
        is_other = real.kind != end.kind or (real.kind == "refused" and real.said != end.said)
        report.add(
            f"process {n} {mutant.what}",
            real,
            *([f"in process {end.kind}: {end.said[:200]}; else {real.said[:200]}"] if is_other else []),
        )
    mutations.put(Mutant("", laboratory.params_text), path)
    return report


def fuzz(params: int, architectures: int, data: int, seed: int) -> dict[str, Report]:
    """Return the reports of all kinds of input."""
    with tempfile.TemporaryDirectory(prefix="dsv3-fuzz-") as name:
        folder = Path(name)
        os.environ["DVC_ROOT"] = name
        laboratory = Laboratory(folder)
        reports = {
            "params.yaml": fuzz_params(laboratory, params, seed),
            "architectures": fuzz_architectures(laboratory, architectures, seed),
            "data": fuzz_data(laboratory, data, seed),
            "processes": fuzz_processes(laboratory, params // 100, seed),
        }
        del os.environ["DVC_ROOT"]
    return reports


def main(
    params: Annotated[int, typer.Option(help="Cases of params.yaml; a hundredth also as real processes.")] = 2000,
    architectures: Annotated[int, typer.Option(help="Cases of an architecture's JSON file.")] = 2000,
    data: Annotated[int, typer.Option(help="Cases of a text.")] = 300,
    seed: Annotated[int, typer.Option(help="Of all cases.")] = 0,
) -> None:
    """Try damaged inputs; print a line for each fault and a table; exit with status 1 if there is a fault."""
    faulthandler.dump_traceback_later(3600, exit=True)
    reports = fuzz(params, architectures, data, seed)
    for name, report in reports.items():
        print(report.line(name))
    if any(report.faults for report in reports.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

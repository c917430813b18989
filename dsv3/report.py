"""What the pipeline found, in one table, and where to look next: `python -m dsv3.report`.

Reads small files only, and says of each missing one which stage writes it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3.artifacts import read_json
from dsv3.cli import command

NEXT = (
    ("make ui", "the run in Aim: curves, routing, samples, figures"),
    ("cat outputs/samples.md", "what the model writes"),
    ("dvc metrics show", "every number of every stage"),
    ("dvc metrics diff", "your numbers beside the committed ones"),
    ("dvc plots show", "curves and figures as one HTML page"),
    ("dvc exp run -S train.learning_rate=4.0e-3", "a first experiment: another learning rate"),
    ("dvc exp show --only-changed", "experiments side by side"),
)


def missing_stages(results: Path, samples: Path) -> dict[str, Path]:
    """Return the stages whose results are not there, with the file that each would have written."""
    files = {stage: results / stage / "metrics.json" for stage in ("tokenize", "estimate_size", "train", "evaluate")}
    return {stage: path for stage, path in {**files, "sample": samples}.items() if not path.is_file()}


def results_rows(results: Path) -> list[tuple[str, str]]:
    """Return (what, value) for each number that a newcomer asks for and that has been found so far."""
    size, train, evaluate = (
        _read(results / stage / "metrics.json") for stage in ("estimate_size", "train", "evaluate")
    )
    record = _read(results / "train" / "run.json")
    return [*_model_rows(size, record), *_training_rows(train, record), *_score_rows(evaluate)]


def _model_rows(size: Mapping[str, Any], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if record:
        rows.append(("configuration", record["params"]["model"]["config"]))
    if size:
        total, active = size["parameters_total"], size["parameters_active"]
        rows.append(("parameters", f"{total:,} ({active:,} active per token)"))
    return rows


def _training_rows(train: Mapping[str, Any], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if record:
        dvc = record["dvc"]
        dirty = " with uncommitted changes" if dvc.get("git_dirty") else ""
        rows.append(("text", f"{dvc.get('data_source') or 'unknown'}"))
        rows.append(("run", f"{record['name']} (Aim {record['aim_run_hash'] or 'off'})"))
        rows.append(("commit", f"{(dvc.get('git_sha') or 'none')[:12]}{dirty}"))
    if train:
        rows.append(
            ("tokens seen", f"{train['tokens_seen']:,} in {train['step']:,} steps, {train['epoch']:.2f} epochs")
        )
        rows.append(("trained on", f"{train['device']} x {train['num_processes']}, {train['precision']}"))
        rows.append(("speed", f"{train['tokens_per_s']:,.0f} tokens/s; {_duration(train['train_s'])} in all"))
    return rows


def _score_rows(evaluate: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not evaluate:
        return []
    heldout, router = evaluate["heldout"], evaluate["router"]
    rows = [
        ("held-out loss", f"{heldout['nats_per_char']:.4f} nats/char, {heldout['bits_per_byte']:.4f} bits/byte"),
        ("", f"{heldout['nats_per_token']:.4f} nats/token, perplexity {heldout['perplexity']:.2f}"),
    ]
    if router:
        worst, dead = router["max_vio_global_max"], router["dead_experts"]
        rows.append(("expert balance", f"MaxVio {worst:.3f} in the worst layer, {dead} dead experts"))
    if module := evaluate.get("mtp", {}).get("depth_1"):
        rows.append(("first prediction module", f"{module['mtp_acceptance']:.1%} of its guesses would be kept"))
    return rows


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return rows of two columns as aligned text."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def report(results: Path, samples: Path) -> str:
    """Return the whole report."""
    parts = []
    if rows := results_rows(results):
        parts.append("Results\n" + table(rows))
    if missing := missing_stages(results, samples):
        lines = [(stage, f"has not run ({path} is missing): dvc repro {stage}") for stage, path in missing.items()]
        parts.append("Not yet there\n" + table(lines))
    parts.append("Where to look next (after: source .venv/bin/activate)\n" + table(NEXT))
    return "\n\n".join(parts)


def main(
    results: Annotated[Path, typer.Option(help="Folder of the stages' results.")] = Path("results"),
    samples: Annotated[Path, typer.Option(help="The page that sample writes.")] = Path("outputs/samples.md"),
) -> None:
    """Print what the pipeline found, and where to look next."""
    typer.echo(report(results, samples))


if __name__ == "__main__":
    command(main)

"""The results of the pipeline in one table, and where to look next: `python -m dsv3.report`.

Reads dvc.yaml and the small files that it names, and says which stages have not run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3.artifacts import read_json
from dsv3.cli import command
from dsv3.params.read import read_yaml

NEXT = (
    ("make ui", "the run in Aim: curves, routing, samples, figures"),
    ("cat outputs/samples.md", "what the model writes"),
    ("dvc metrics show", "every number of every stage"),
    ("dvc metrics diff", "your numbers beside the committed ones"),
    ("dvc plots show", "curves and figures as one HTML page"),
    ("dvc exp run -S train.learning_rate=4.0e-3", "a first experiment: another learning rate"),
    ("dvc exp show --only-changed", "experiments side by side"),
)


def stage_results(pipeline: Path) -> dict[str, Path]:
    """Return for each stage of dvc.yaml, in its order, a file that is there once it has run.

    It is the stage's metrics file, which is committed, or else its first output.
    """
    stages = read_yaml(pipeline)["stages"]
    return {name: pipeline.parent / _first_result(stage) for name, stage in stages.items()}


def _first_result(stage: Mapping[str, Any]) -> str:
    first = [*stage.get("metrics", []), *stage.get("outs", [])][0]
    return next(iter(first)) if isinstance(first, dict) else first  # one with flags is a mapping of one path


def results_rows(results: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Return (what, value) for each number that a newcomer asks for and that has been found so far."""
    size, train, evaluate = (_read(results[stage]) for stage in ("estimate_size", "train", "evaluate"))
    record = _read(results["train"].with_name("run.json"))
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


def report(pipeline: Path) -> str:
    """Return the whole report on the pipeline whose dvc.yaml is given."""
    results, parts = stage_results(pipeline), []
    if rows := results_rows(results):
        parts.append("Results\n" + table(rows))
    if missing := {stage: path for stage, path in results.items() if not path.exists()}:
        lines = [(stage, f"has not run ({path} is missing): dvc repro {stage}") for stage, path in missing.items()]
        parts.append("Not yet there\n" + table(lines))
    parts.append("Where to look next (after: source .venv/bin/activate)\n" + table(NEXT))
    return "\n\n".join(parts)


def main(
    pipeline: Annotated[Path, typer.Option(help="The pipeline whose results are shown.")] = Path("dvc.yaml"),
) -> None:
    """Print the results of the pipeline, and where to look next."""
    typer.echo(report(pipeline))


if __name__ == "__main__":
    command(main)

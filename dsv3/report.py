"""What the pipeline came to: `python -m dsv3.report`, and `python -m dsv3.report compare A B` for several runs.

Alone it reads dvc.yaml and the small files that it names, says which stages have not run, and where to look next.
`compare` puts DVC's experiments, commits or the workspace side by side.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from dsv3.artifacts import REMEDY, read_json
from dsv3.cli import run_app
from dsv3.comparison import WORKSPACE, comparison, read_runs
from dsv3.errors import UserError, one_line
from dsv3.params.pipeline import read_outputs
from dsv3.params.read import read_params
from dsv3.tracking.recorder import read_record
from dsv3.tracking.shown import missing_views, rebuilding
from dsv3.tracking.stages import SHOWN, TRAINING

NEXT = (
    ("make ui", "the run in Aim: curves, routing, samples, figures"),
    ("cat outputs/samples.md", "what the model writes"),
    ("python -m dsv3.report compare", "your numbers beside the committed ones"),
    ("cat results/*/metrics.json", "every number of every stage"),
    ("dvc plots show", "curves and figures as one HTML page"),
    ("dvc exp run -S train.learning_rate=4.0e-3", "a first experiment: another learning rate"),
    ("make compare", "all experiments in one table, what is equal in all left out"),
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def stage_outputs(pipeline: Path) -> dict[str, list[Path]]:
    """Return for each stage of dvc.yaml, in its order, what it writes; the first is there once it has run here.

    Metrics come last: Git holds them, so that they are there in a clone where no stage has run.
    """
    outputs = read_outputs(pipeline, ("outs", "metrics"))
    return {name: [pipeline.parent / path for path in paths] for name, paths in outputs.items()}


def results_rows(outputs: Mapping[str, Sequence[Path]]) -> list[tuple[str, str]]:
    """Return (what, value) for each number that a newcomer asks for and that has been found so far."""
    run = _found(outputs.get(TRAINING, ()), "run.json")
    record = read_record(run) if run else {}
    found: list[tuple[str, str]] = []
    for stage, shown in SHOWN.items():
        if shown.lines is not None:
            metrics = _found(outputs.get(stage, ()), "metrics.json")
            try:
                found += shown.lines(read_json(metrics) if metrics else {}, record)
            except (LookupError, TypeError, ValueError, AttributeError) as error:  # a name that lacks, or is no number
                reason = one_line(f"{type(error).__name__}: {error}")
                raise UserError(f"{metrics or run}: is not what {stage} writes ({reason}); {REMEDY}") from None
    return found


def _found(outputs: Sequence[Path], name: str) -> Path | None:
    """Return the output of that name; None where it is not there."""
    return next((path for path in outputs if path.name == name and path.is_file()), None)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return rows of two columns as aligned text."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def report(pipeline: Path) -> str:
    """Return the whole report on the pipeline whose dvc.yaml is given."""
    outputs, parts = stage_outputs(pipeline), []
    if rows := results_rows(outputs):
        parts.append("Results\n" + table(rows))
    if missing := {stage: paths[0] for stage, paths in outputs.items() if not paths[0].exists()}:
        lines = [(stage, f"has not run ({path} is missing): dvc repro {stage}") for stage, path in missing.items()]
        parts.append("Not yet there\n" + table(lines))
    parts += views_note(pipeline.parent)
    parts.append("Where to look next (after: source .venv/bin/activate)\n" + table(NEXT))
    return "\n\n".join(parts)


def views_note(root: Path) -> list[str]:
    """Return what to run where a chosen tracker does not show the results; nothing where all do."""
    try:
        names = missing_views(root / "results", read_params(root / "params.yaml"))
    except UserError:
        return []  # every stage tells of it
    remedy = table([(rebuilding(names), "shows it, without training")])
    return [f"Not shown in {', '.join(names)}\n{remedy}"] if names else []


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    pipeline: Annotated[Path, typer.Option(help="The pipeline whose results are shown.")] = Path("dvc.yaml"),
) -> None:
    """Print the results of the pipeline, and where to look next."""
    if context.invoked_subcommand is None:
        typer.echo(report(pipeline))


@app.command()
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="Experiments, commits, branches, or workspace; one alone is held against HEAD."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="A Markdown table instead of one for a terminal.")
    ] = False,
) -> None:
    """Print runs side by side: what was chosen otherwise, and the numbers beside the first run's."""
    names = runs or [WORKSPACE]
    names = names if len(names) > 1 else ["HEAD", *names]
    typer.echo(comparison(read_runs(list(dict.fromkeys(names))), markdown))


if __name__ == "__main__":
    run_app(app)

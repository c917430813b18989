"""Studies: one question, several trainings, one page of the documents.

python -m benchmarks.study                          which studies there are, and how far each is
python -m benchmarks.study run ablations --jobs 2   make the runs that are missing; Ctrl-C and again goes on
python -m benchmarks.study report ablations         write docs/ablations.md and its figure from the finished runs
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.studies.definition import read_study, run_flags, run_names, study_names, teacher_runs
from dsv3.cli import run_app

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Run a study's trainings as DVC experiments, and write its page from their results.",
)
StudyArgument = Annotated[str, typer.Argument(help="A name that this command prints without arguments.")]


@app.callback(invoke_without_command=True)
def list_studies(context: typer.Context) -> None:
    """Print the studies and what they write."""
    if context.invoked_subcommand is None:
        names = study_names()
        width = max(map(len, names))
        for name in names:
            study = read_study(name)
            count = len(run_names(name, study))
            typer.echo(f"{name:{width}} {count} runs, {study.document}: {', '.join(study.variants)}")


@app.command()
def run(
    name: StudyArgument,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each training; its share of the cores by default.")
    ] = None,
    set_param: Annotated[
        list[str] | None, typer.Option("--set-param", "-S", help="Passed on to every dvc exp run.")
    ] = None,
) -> None:
    """Make the runs that DVC does not hold yet."""
    from benchmarks.studies.training import Job, experiments, train
    from benchmarks.timing import processor

    study, done = read_study(name), experiments()
    extra = [word for pair in set_param or [] for word in ("-S", pair)]
    missing = {
        run: Job([*run_flags(name, study, variant, seed), *extra], teacher_runs(name, study, variant, seed))
        for run, (variant, seed) in run_names(name, study).items()
        if run not in done
    }
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    typer.echo(f"{name}: {len(missing)} runs to make, {jobs} at a time, {threads} thread(s) each")
    train(missing, jobs, threads, f"{jobs} at a time, {threads} thread(s) each, {processor()}")


@app.command()
def report(
    name: StudyArgument,
    root: Annotated[Path, typer.Option(help="The repository whose .aim and experiments are read.")] = Path(),
    how: Annotated[
        str | None, typer.Option(help="How the runs were made, where their commit messages do not say it.")
    ] = None,
) -> None:
    """Write the study's section of its page, and its figure."""
    from benchmarks.studies.figures import figure
    from benchmarks.studies.pages import replace_section
    from benchmarks.studies.report import section
    from benchmarks.studies.results import checked_with_dvc, read_results
    from benchmarks.studies.scaling import section as law_section
    from dsv3.evaluation.figures import save_figure

    study = read_study(name)
    results = read_results(root, name, run_names(name, study))
    messages = checked_with_dvc(root, results)
    page = Path(study.document)
    picture = page.parent / "figures" / f"{name}.png"
    if results:
        save_figure(figure(study, results), picture)
    recorded = {message for message in messages.values() if not message.startswith("dvc: ")}  # DVC's own words
    conditions = how or "; ".join(sorted(recorded)) or "on a machine that was not recorded"
    write_section = law_section if study.figure == "law" and results else section
    text = write_section(name, study, results, conditions, picture.relative_to(page.parent).as_posix())
    replace_section(page, name, text)
    typer.echo(f"{page}: {len(results)} of {len(run_names(name, study))} runs, {len(messages)} compared with DVC")


if __name__ == "__main__":
    run_app(app)

"""Put a training back into Aim from its results: `python -m dsv3.tracking.rebuild`.

Aim is a view. Whoever checks out results that were made elsewhere (a clone, another branch, an experiment pulled with
`dvc exp pull`), or has lost `.aim`, builds the run from what DVC holds. A run that Aim still has is completed rather
than doubled, for values are keyed by step.
"""

import csv
from pathlib import Path
from typing import Annotated

import typer

from dsv3.artifacts import read_json
from dsv3.cli import ParamsOption, command
from dsv3.params.read import read_params
from dsv3.tracking.aim import AimSink
from dsv3.tracking.metrics import METRICS, TABLES
from dsv3.tracking.recorder import Row, identity_of, read_record


def rebuild(results: Path, samples: Path, repo: str | None) -> str:
    """Write everything in `results` and the page `samples` into the Aim repository `repo`; return the run's hash.

    Raises `UserError` without results/train/run.json; parts of later stages that are not there are left out.
    """
    record = read_record(results / "train" / "run.json")
    sink = AimSink(repo)
    run_hash = sink.open(identity_of(record), record["aim_run_hash"], is_owner=True)
    assert run_hash is not None
    for table in TABLES:
        for row in read_table(results / "train" / f"{table}.tsv"):
            sink.log(table, row)
    for stage in ("train", "evaluate"):
        metrics = results / stage / "metrics.json"
        if metrics.is_file():
            sink.result(stage, read_json(metrics), record["step"])
    for figure in sorted((results / "evaluate" / "figures").glob("*.png")):
        sink.figure(figure.stem, figure, record["step"], {"subset": "heldout"})
    for layer, loads in read_loads(results / "evaluate" / "expert_load.tsv").items():
        sink.distribution("load", loads, record["step"], {"subset": "heldout", "layer": layer})
    if samples.is_file():
        sink.text("samples", samples.read_text(encoding="utf-8"), record["step"], {})
    sink.close("finished")
    return run_hash


def read_table(path: Path) -> list[Row]:
    """Return the rows of a table that the recorder wrote, without their empty cells; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return [
            {name: cell if METRICS[name].is_text else float(cell) for name, cell in row.items() if cell} for row in rows
        ]


def read_loads(path: Path) -> dict[int, list[float]]:
    """Return the load of each expert by layer from evaluate's table."""
    loads: dict[int, list[float]] = {}
    for row in read_table(path):
        loads.setdefault(int(row["layer"]), []).append(float(row["load"]))
    return loads


def main(
    results: Annotated[Path, typer.Option(help="Folder of the stages' results.")] = Path("results"),
    samples: Annotated[Path, typer.Option(help="The page that sample wrote.")] = Path("outputs/samples.md"),
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Put the training whose results are checked out back into Aim."""
    run_hash = rebuild(results, samples, read_params(params).runtime.aim_repo)
    typer.echo(f"Aim run {run_hash} holds {results} again; look at it with: make ui")


if __name__ == "__main__":
    command(main)

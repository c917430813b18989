"""Write a training into the trackers again from its results: `python -m dsv3.tracking.rebuild`.

A tracker is a view. Whoever checks out results that were made elsewhere (a clone, another branch, an experiment pulled
with `dvc exp pull`), has lost `.aim`, or names another tracker in params.yaml, builds the view from what DVC holds,
without training. A run that the tracker still has is completed rather than doubled.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from dsv3.cli import ParamsOption, command
from dsv3.errors import UserError, one_line
from dsv3.params.read import Params, read_params
from dsv3.params.runtime import TrackerName
from dsv3.tracking.events import Event, Row
from dsv3.tracking.recorder import read_record, shown_run
from dsv3.tracking.stages import SHOWN, training_record
from dsv3.tracking.tracker import Tracker, load_tracker, remedy


def all_events(results: Path, samples: Path, step: int) -> Iterator[Event]:
    """Yield all that the stages left in `results` and the page `samples`; stages that are not there are left out."""
    pages = {"sample": samples}
    for stage, shown in SHOWN.items():
        if shown.events is not None:
            yield from shown.events(pages.get(stage, results / stage / shown.output), step)


def rebuild(results: Path, samples: Path, params: Params, tracker: Tracker) -> str | None:
    """Write everything in `results` and the page `samples` into `tracker`; return its run's hash, if it has hashes.

    Raises `UserError` without results/train/run.json.
    """
    step = read_record(training_record(results))["step"]
    identity, known_hash = shown_run(results, params)
    run_hash = tracker.open(identity, known_hash, "rebuild")
    for event in all_events(results, samples, step):
        if not (tracker.has_rows and isinstance(event, Row)):
            tracker.write(event)
    tracker.close("finished")
    return run_hash


def main(
    tracker: Annotated[
        TrackerName | None, typer.Option(help="The tracker to rebuild; default: all of runtime.trackers.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder of the stages' results.")] = Path("results"),
    samples: Annotated[Path, typer.Option(help="The page that sample wrote.")] = Path("outputs/samples.md"),
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Write the training whose results are checked out into the trackers again, without training."""
    parameters = read_params(params)
    names: list[TrackerName] = [tracker] if tracker else parameters.runtime.trackers
    for name in names:
        try:
            loaded = load_tracker(name, parameters.runtime)
        except (Exception, SystemExit) as error:  # some libraries call sys.exit
            reason = one_line(f"{type(error).__name__}: {error}")
            raise UserError(f"tracker {name} can't be imported ({reason}); {remedy(name)}") from None
        run_hash = rebuild(results, samples, parameters, loaded)
        typer.echo(f"{name}: run {run_hash or 'rebuilt'} holds {results} again")


if __name__ == "__main__":
    command(main)

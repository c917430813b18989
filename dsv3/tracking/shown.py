"""Which of the chosen trackers show the results that are checked out, as far as the files that they keep here say.

Section `runtime` re-runs no stage, so a tracker that was named after the training has never seen it, and DVC, which
restores everything from its cache, starts nothing of ours that could say so. The report and the doctor do.
"""

from pathlib import Path

from dsv3.params.read import Params
from dsv3.params.runtime import TrackerName
from dsv3.tracking.places import HAS_RUN
from dsv3.tracking.recorder import shown_run
from dsv3.tracking.stages import training_record


def missing_views(results: Path, params: Params) -> list[TrackerName]:
    """Return the trackers of `runtime.trackers` that don't show the training in `results`; none where there is none."""
    if not training_record(results).is_file():
        return []
    identity, run_hash = shown_run(results, params)
    return [name for name in params.runtime.trackers if not HAS_RUN[name](params.runtime, identity, run_hash)]


def rebuilding(names: list[TrackerName]) -> str:
    """Return the command that shows the results in these trackers."""
    return "python -m dsv3.tracking.rebuild" + (f" --tracker {names[0]}" if len(names) == 1 else "")

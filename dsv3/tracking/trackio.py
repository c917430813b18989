"""trackio: Hugging Face's local tracker; its database lies in `.trackio` beside `.aim`, and needs no account.

`TRACKIO_DIR=.trackio trackio show --project dsv3-lab` opens its page. Accelerate's own tracker for it starts a run
under a name that it makes up, and can't find it again for a later stage or a resumed training: it is not used here.
"""

import contextlib
import contextvars
import importlib
import io
import os
from functools import partial
from typing import Any

import numpy as np

from dsv3.params.runtime import RuntimeParams
from dsv3.tracking.events import Distribution, Event, Figure, Heatmap, Result, Row, Text, path_name
from dsv3.tracking.identity import RunIdentity
from dsv3.tracking.loads import picture
from dsv3.tracking.metrics import curve_names
from dsv3.tracking.places import PROJECT, trackio_folder
from dsv3.tracking.stages import charted
from dsv3.tracking.tracker import Mode

OPTIONS = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}

os.environ["TRACKIO_DIR"] = str(trackio_folder())  # read when it is imported
trackio: Any = importlib.import_module("trackio")  # an extra, which type checkers need not find


def tracker(runtime: RuntimeParams) -> "TrackioTracker":
    """Return the tracker; nothing of it is configured here, but for what trackio reads from the environment."""
    return TrackioTracker()


class TrackioTracker:
    """Shows a run as `<name>-<key>`; a training, and a rebuild, begin it anew."""

    has_rows = False

    def open(self, identity: RunIdentity, run_hash: str | None, mode: Mode) -> str | None:
        """Open the run; the name is ours, so no hash is returned."""
        name = identity.unique_name
        is_known = name in trackio.SQLiteStorage.get_runs(PROJECT)
        if is_known and mode != "add":
            trackio.SQLiteStorage.delete_run(PROJECT, name)  # rows can't be written twice: points would be drawn twice
        self.has_rows = is_known and mode == "add"
        config = {"title": identity.title, "changes": identity.change_tags, **identity.facts}
        begin = partial(trackio.init, PROJECT, name, identity.experiment, config=config, resume="allow", **OPTIONS)
        with contextlib.redirect_stdout(io.StringIO()):  # it introduces itself
            # In a context of its own: what trackio takes for the current run, it closes once more as the process ends.
            self._run = contextvars.copy_context().run(begin)

    def write(self, event: Event) -> None:
        """Log the event; curves are named `<subset>/<name>`, and of a layer `<subset>/<name>/layer_<i>`."""
        match event:
            case Row(table, cells):
                self._run.log(curve_names(table, cells), step=int(cells["step"]))
            case Result(stage, metrics, step):
                values = {f"{stage}/{subset}/{name}": value for subset, name, value in charted(stage, metrics)}
                self._run.log(values, step=step)
            case Text(name, text, step, context):
                code = "\n".join(f"    {line}" for line in text.splitlines())  # as it is, line breaks too
                self._run.log({path_name(name, context): trackio.Markdown(code)}, step=step)
            case Figure(name, _, step, context) | Heatmap(name, _, _, step, context):
                image = trackio.Image(picture(event), caption=event.caption)
                self._run.log({path_name(name, context): image}, step=step)
            case Distribution(name, heights, step, context):
                edges = np.arange(len(heights) + 1)
                histogram = trackio.Histogram(np_histogram=(np.asarray(heights, dtype=np.float64), edges))
                self._run.log({path_name(name, context): histogram}, step=step)

    def close(self, status: str) -> None:
        """Note how the run ended, write what is left, and close."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.log({"status": trackio.Markdown(status)})
            self._run.finish()

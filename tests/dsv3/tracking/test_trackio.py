import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dsv3.artifacts import write_json
from dsv3.tracking.events import Distribution, Result, Text
from dsv3.tracking.recorder import add_to_run, open_recorder
from tests.training_inputs import ROOT


class FakeRun:
    """As much of a trackio run as the tracker calls."""

    def __init__(self, options):
        self.options, self.rows, self.is_finished = options, [], False

    def log(self, row, step=None):
        self.rows.append((step, row))

    def finish(self):
        print("* Run finished")
        self.is_finished = True


@pytest.fixture
def trackio(monkeypatch):
    """A stand-in for the package, which is an extra; it remembers the runs that it began and was not told to delete."""
    runs: dict[str, list[FakeRun]] = {}

    def init(project, name, group, **options):
        print("* Trackio project initialized")
        runs.setdefault(name, []).append(FakeRun({"group": group, **options}))
        return runs[name][-1]

    def histogram(np_histogram):
        heights, edges = np_histogram
        return ("histogram", heights.tolist(), edges.tolist())

    storage = SimpleNamespace(get_runs=lambda project: list(runs), delete_run=lambda project, name: runs.pop(name))
    drawn = {"Markdown": lambda text: ("text", text), "Histogram": histogram}
    package = SimpleNamespace(init=init, SQLiteStorage=storage, runs=runs, **drawn)
    monkeypatch.setenv("TRACKIO_DIR", "unused")
    monkeypatch.setitem(sys.modules, "trackio", package)
    monkeypatch.delitem(sys.modules, "dsv3.tracking.trackio", raising=False)
    yield package
    sys.modules.pop("dsv3.tracking.trackio", None)


@pytest.fixture
def runtime(params):
    return params.runtime.model_copy(update={"trackers": ["trackio"]})


def test_rows_have_their_step_and_names_by_subset_and_layer(bare_project, identity, runtime, trackio, capsys):
    recorder = open_recorder(bare_project / "results", runtime, identity)
    recorder.log("history", {"step": 10, "loss": 4.0})
    recorder.log("router", {"step": 10, "layer": 1, "max_vio": 0.5})
    recorder.close("finished")
    ((run,),) = trackio.runs.values()
    assert run.rows == [
        (10, {"train/loss": 4.0}),
        (10, {"train/max_vio/layer_1": 0.5}),
        (None, {"status": ("text", "finished")}),
    ]
    assert run.options["config"]["params"] == identity.params
    assert run.is_finished
    assert capsys.readouterr().out == ""


def test_a_training_that_goes_on_begins_the_run_anew_and_later_stages_find_it_again(
    bare_project, identity, runtime, params, trackio
):
    open_recorder(bare_project / "results", runtime, identity).close("interrupted")
    training = open_recorder(bare_project / "results", runtime, identity)
    training.close("finished")
    write_json(bare_project / "results" / "run.json", training.run_record())
    events = [
        Result("evaluate", {"test": {"nats_per_char": 1.5}}, 10),
        Text("sample", "To be\nor", 10, {"prompt": "To"}),
        Distribution("load_share", [0.25, 0.75], 10, {"layer": 1}),
    ]
    add_to_run(bare_project / "results" / "run.json", params.model_copy(update={"runtime": runtime}), events)
    ((_, later),) = trackio.runs.values()
    assert later.options["resume"] == "allow"
    assert [row for _, row in later.rows[:3]] == [
        {"evaluate/test/nats_per_char": 1.5},
        {"sample/To": ("text", "    To be\n    or")},
        {"load_share/1": ("histogram", [0.25, 0.75], [0, 1, 2])},
    ]


REBUILD = """
import json, sys
from pathlib import Path
from dsv3.tracking.rebuild import main
for _ in range(2):
    main("trackio", Path("results"), Path("samples.md"))
from trackio.sqlite_storage import SQLiteStorage as storage
(run,) = storage.get_runs("dsv3-lab")
Path("read.json").write_text(json.dumps([run, storage.get_logs("dsv3-lab", run)]))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("trackio") is None, reason="a group of its own: pip install --group trackio"
)
def test_the_package_itself_holds_a_rebuilt_run_once_and_says_nothing(bare_project, identity, params):
    recorder = open_recorder(
        bare_project / "results/train", params.runtime.model_copy(update={"trackers": []}), identity
    )
    recorder.log("history", {"step": 10, "loss": 4.0})
    write_json(bare_project / "results/train/run.json", recorder.run_record())
    recorder.close("finished")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment.pop("TRACKIO_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", REBUILD], cwd=bare_project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "trackio: run rebuilt holds results again\n" * 2
    name, rows = json.loads((bare_project / "read.json").read_text())
    assert name.startswith("union-brig-")
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [4.0]
    assert (bare_project / ".trackio/dsv3-lab.db").is_file()

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv3.artifacts import write_json
from dsv3.tracking.events import Result, Text
from dsv3.tracking.rebuild import rebuild
from dsv3.tracking.recorder import add_to_run, open_recorder
from dsv3.tracking.tracker import load_tracker


class FakeRun:
    """As much of a W&B run as the tracker calls."""

    def __init__(self, resumed, mode, summary):
        self.settings = SimpleNamespace(mode=mode)
        self.resumed, self.rows, self.summary, self.step_metrics, self.exit_code = resumed, [], summary, [], None
        self.fails = False

    def define_metric(self, name, step_metric):
        self.step_metrics.append((name, step_metric))

    def log(self, row):
        if self.fails:
            raise ConnectionError("no server")
        self.rows.append(row)
        self.summary["step"] = row["step"]

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which is an extra and wants an account; it remembers the runs that it began.

    As there, each opening leaves a folder, a resumed run has its summary, the last of all that was logged too, and
    offline nobody knows whether there was a run of that id.
    """
    runs: list[tuple[dict, FakeRun]] = []

    def init(**options):
        mode = os.environ.get("WANDB_MODE", "online")
        known = [run.summary for earlier, run in runs if mode == "online" and earlier["id"] == options["id"]]
        kind = "run" if mode == "online" else "offline-run"
        Path(options["dir"], "wandb", f"{kind}-20260101_00000{len(runs)}-{options['id']}").mkdir(
            parents=True, exist_ok=True
        )
        runs.append((options, FakeRun(bool(known), mode, dict(known[-1]) if known else {})))
        return runs[-1][1]

    drawn = {"Html": lambda text: ("html", text), "Histogram": lambda np_histogram: np_histogram[0].tolist()}
    package = SimpleNamespace(init=init, runs=runs, **drawn)
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delitem(sys.modules, "dsv3.tracking.wandb", raising=False)
    yield package
    sys.modules.pop("dsv3.tracking.wandb", None)


@pytest.fixture
def runtime(params):
    return params.runtime.model_copy(update={"trackers": ["wandb"]})


def test_rows_have_their_own_step_and_names_by_subset_and_layer(bare_project, identity, runtime, wandb):
    recorder = open_recorder(bare_project / "results", runtime, identity)
    recorder.log("history", {"step": 10, "loss": 4.0})
    recorder.log("router", {"step": 10, "layer": 1, "max_vio": 0.5})
    recorder.close("finished")
    ((options, run),) = wandb.runs
    assert run.rows == [{"step": 10, "train/loss": 4.0}, {"step": 10, "train/max_vio/layer_1": 0.5}]
    assert run.step_metrics == [("*", "step")]
    assert (options["name"], options["group"]) == ("union-brig", "config_nano")
    assert options["config"]["params"] == identity.params
    assert (run.summary["status"], run.exit_code) == ("finished", 0)


def test_notes_which_are_markdown_show_the_changes_as_they_are(bare_project, identity, runtime, wandb):
    changed = replace(identity, changes={"data.path": "<img src=x>\n# a"})
    open_recorder(bare_project / "results", runtime, changed).close("finished")
    assert wandb.runs[0][0]["notes"] == "data.path: &lt;img src=x&gt; # a"


def test_later_stages_find_the_run_again_by_its_id(bare_project, identity, runtime, params, wandb):
    training = open_recorder(bare_project / "results", runtime, identity)
    training.close("interrupted")
    write_json(bare_project / "results" / "run.json", training.run_record())
    events = [
        Result("evaluate", {"test": {"nats_per_char": 1.5}}, 10),
        Text("sample", "To <be", 10, {"prompt": "To\n"}),
    ]
    add_to_run(bare_project / "results" / "run.json", params.model_copy(update={"runtime": runtime}), events)
    (first, interrupted), (second, run) = wandb.runs
    assert first["id"] == second["id"]
    assert interrupted.exit_code == 1
    assert run.summary["evaluate/test"] == {"nats_per_char": 1.5}
    assert run.rows == [{"step": 10, "sample/To": ("html", "<pre>To &lt;be</pre>")}]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_rows_that_a_run_holds_are_not_logged_a_second_time(
    bare_project, identity, runtime, params, wandb, monkeypatch, mode
):
    monkeypatch.setenv("WANDB_MODE", mode)
    recorder = open_recorder(bare_project / "results", runtime, identity)
    recorder.log("history", {"step": 10, "loss": 4.0})
    state = recorder.state()
    recorder.close("interrupted")
    resumed = open_recorder(bare_project / "results", runtime, identity)
    resumed.restore(state)
    resumed.close("finished")
    write_json(bare_project / "results" / "run.json", resumed.run_record())
    add_to_run(bare_project / "results" / "run.json", params.model_copy(update={"runtime": runtime}), [])
    assert [run.rows for _, run in wandb.runs] == [[{"step": 10, "train/loss": 4.0}], [], []]


def test_a_run_that_the_server_has_lost_is_given_its_rows_again(bare_project, identity, runtime, wandb):
    recorder = open_recorder(bare_project / "results", runtime, identity)
    recorder.log("history", {"step": 10, "loss": 4.0})
    state = recorder.state()
    recorder.close("interrupted")
    wandb.runs.clear()
    resumed = open_recorder(bare_project / "results", runtime, identity)
    resumed.restore(state)
    assert wandb.runs[0][1].rows == [{"step": 10, "train/loss": 4.0}]


@pytest.fixture
def torn(bare_project, identity, runtime, wandb):
    """A training that W&B showed up to step 10 of 20, and its recorder, which is not closed."""
    recorder = open_recorder(bare_project / "results" / "train", runtime, identity)
    for step in (10, 20):
        recorder.log("history", {"step": step, "loss": 40.0 / step})
        recorder.log("router", {"step": step, "layer": 1, "load_shares": "0.25 0.75"})
        wandb.runs[0][1].fails = True
    return recorder


SECOND_HALF = [{"step": 20, "train/loss": 2.0}, {"step": 20, "load_share/train/1": [0.25, 0.75]}]


def shown(run):
    """Return the rows of a run that show anything: loads alone are no curve."""
    return [row for row in run.rows if row.keys() > {"step"}]


def test_rows_that_were_lost_come_with_a_rebuild_and_only_they_and_only_once(
    bare_project, torn, params, runtime, wandb
):
    run = bare_project / "results" / "train" / "run.json"
    write_json(run, torn.run_record())
    torn.close("finished")
    own = params.model_copy(update={"runtime": runtime})
    add_to_run(run, own, [Text("sample", "To be", 20, {"prompt": "To"})])  # it makes 20 the last step of all
    for _ in range(2):
        rebuild(bare_project / "results", bare_project / "samples.md", own, load_tracker("wandb", runtime))
    assert [shown(run) for _, run in wandb.runs[2:]] == [SECOND_HALF, []]


def test_a_training_that_goes_on_gives_the_run_the_rows_that_it_lost_and_no_row_twice(
    bare_project, identity, torn, runtime, wandb
):
    state = torn.state()
    torn.close("interrupted")
    resumed = open_recorder(bare_project / "results" / "train", runtime, identity)
    resumed.restore(state)
    resumed.log("history", {"step": 30, "loss": 1.0})
    resumed.close("finished")
    assert shown(wandb.runs[1][1]) == [*SECOND_HALF, {"step": 30, "train/loss": 1.0}]


def test_a_run_of_an_early_version_has_its_rows_up_to_its_last_step(bare_project, identity, torn, runtime, wandb):
    state = torn.state()
    torn.close("interrupted")
    del wandb.runs[0][1].summary["last_row"]
    resumed = open_recorder(bare_project / "results" / "train", runtime, identity)
    resumed.restore(state)
    assert shown(wandb.runs[1][1]) == SECOND_HALF

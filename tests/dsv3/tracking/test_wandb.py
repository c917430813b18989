import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv3.artifacts import write_json
from dsv3.tracking.events import Result, Text
from dsv3.tracking.recorder import add_to_run, open_recorder


class FakeRun:
    """As much of a W&B run as the tracker calls."""

    def __init__(self, resumed, mode):
        self.settings = SimpleNamespace(mode=mode)
        self.resumed, self.rows, self.summary, self.step_metrics, self.exit_code = resumed, [], {}, [], None

    def define_metric(self, name, step_metric):
        self.step_metrics.append((name, step_metric))

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which is an extra and wants an account; it remembers the runs that it began.

    As there, each opening leaves a folder, and offline nobody knows whether there was a run of that id.
    """
    runs: list[tuple[dict, FakeRun]] = []

    def init(**options):
        mode = os.environ.get("WANDB_MODE", "online")
        is_known = mode == "online" and any(earlier["id"] == options["id"] for earlier, _ in runs)
        kind = "run" if mode == "online" else "offline-run"
        Path(options["dir"], "wandb", f"{kind}-20260101_00000{len(runs)}-{options['id']}").mkdir(
            parents=True, exist_ok=True
        )
        runs.append((options, FakeRun(is_known, mode)))
        return runs[-1][1]

    package = SimpleNamespace(init=init, Html=lambda text: ("html", text), runs=runs)
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

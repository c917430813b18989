import sqlite3

import pytest

from dsv3.artifacts import write_json
from dsv3.doctor import check_views
from dsv3.report import report
from dsv3.tracking.recorder import open_recorder
from dsv3.tracking.shown import missing_views
from tests.committed import ROOT


@pytest.fixture
def trained(bare_project, identity, params, monkeypatch):
    """Return a function that leaves a training's results, shown in the given trackers; it returns all of Params."""
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    monkeypatch.delenv("TRACKIO_DIR", raising=False)

    def train(*trackers):
        runtime = params.runtime.model_copy(update={"trackers": list(trackers)})
        recorder = open_recorder(bare_project / "results/train", runtime, identity)
        recorder.log("history", {"step": 10, "loss": 4.0})
        write_json(bare_project / "results/train/run.json", recorder.run_record())
        recorder.close("finished")

    return train


def asked(params, *trackers):
    return params.model_copy(update={"runtime": params.runtime.model_copy(update={"trackers": list(trackers)})})


def test_a_tracker_that_was_named_after_the_training_does_not_show_it(bare_project, trained, params):
    names = ("tensorboard", "wandb", "trackio")
    assert missing_views(bare_project / "results", asked(params, *names)) == []  # nothing is there to be shown
    trained("tensorboard")
    assert missing_views(bare_project / "results", asked(params, *names)) == ["wandb", "trackio"]


def test_aim_shows_what_its_repository_holds(bare_project, trained, params):
    pytest.importorskip("aim", reason="Aim has no wheels for this Python")
    trained("aim")
    assert missing_views(bare_project / "results", asked(params, "aim")) == []
    (chunk,) = (bare_project / ".aim/meta/chunks").glob("*[!k]")
    chunk.rename(bare_project / "elsewhere")
    assert missing_views(bare_project / "results", asked(params, "aim")) == ["aim"]


def test_wandb_and_trackio_show_what_their_files_name(bare_project, trained, params, identity):
    trained()
    (bare_project / f"wandb/offline-run-20260101_000000-{identity.key[:24]}").mkdir(parents=True)
    (bare_project / ".trackio").mkdir()
    with sqlite3.connect(bare_project / ".trackio/dsv3-lab.db") as database:
        database.execute("CREATE TABLE configs (run_name TEXT)")
    trackers = asked(params, "wandb", "trackio")
    assert missing_views(bare_project / "results", trackers) == ["trackio"]
    with sqlite3.connect(bare_project / ".trackio/dsv3-lab.db") as database:
        database.execute("INSERT INTO configs VALUES (?)", [f"{identity.name}-{identity.key[:8]}"])
    assert missing_views(bare_project / "results", trackers) == []


def test_the_doctor_and_the_report_name_the_command(bare_project, trained):
    path = bare_project / "params.yaml"
    path.write_text(path.read_text().replace("trackers: [aim]", "trackers: [wandb]"))
    trained()
    command = "python -m dsv3.tracking.rebuild --tracker wandb"
    assert str(check_views()).endswith(f"wandb does not show the results that are checked out; run: {command}")
    (bare_project / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    assert f"Not shown in wandb\n  {command}  shows it" in report(bare_project / "dvc.yaml")

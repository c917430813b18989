import sqlite3

import pytest

from dsv3.artifacts import write_json
from dsv3.doctor import check_views
from dsv3.report import report
from dsv3.tracking.recorder import add_to_run, open_recorder
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


def edited(params, section, **values):
    return params.model_copy(update={section: getattr(params, section).model_copy(update=values)})


@pytest.fixture
def locked(bare_project):
    """Return a function that writes the dvc.lock of a training and an evaluation with the given parameters."""

    def write(params):
        values = params.model_dump(mode="json")
        sections = {"tokenize": ["tokenize"], "train": ["seed", "model", "train"], "evaluate": ["evaluate"]}
        made_with = {stage: {name: values[name] for name in names} for stage, names in sections.items()}
        stages = {stage: {"cmd": "x", "params": {"params.yaml": made}} for stage, made in made_with.items()}
        write_json(bare_project / "dvc.lock", {"schema": "2.0", "stages": stages | {"plain": {"cmd": "x"}}})

    return write


EDITS = [("train", {"learning_rate": 0.1}), ("tokenize", {"test_fraction": 0.1}), ("evaluate", {"stride": 16})]


@pytest.mark.parametrize(("section", "values"), EDITS)
def test_what_was_edited_and_not_run_hides_no_results(bare_project, trained, params, locked, section, values):
    trained("tensorboard")
    locked(params)
    after = edited(asked(params, "tensorboard"), section, **values)
    assert missing_views(bare_project / "results", after) == []
    assert missing_views(bare_project / "results", asked(after, "wandb")) == ["wandb"]


@pytest.mark.parametrize(("section", "values"), EDITS[:2])
@pytest.mark.parametrize("content", [None, "<<<<<<< HEAD", "[1]", "stages: {a: 1}"])
def test_without_a_lock_file_the_record_tells_of_the_training(bare_project, trained, params, section, values, content):
    trained("tensorboard")
    if content:
        (bare_project / "dvc.lock").write_text(content)
    assert missing_views(bare_project / "results", edited(asked(params, "tensorboard"), section, **values)) == []


@pytest.mark.parametrize(("section", "values"), EDITS[1:])
def test_a_stage_that_ran_with_other_parameters_after_the_training_has_a_run(
    bare_project, trained, params, locked, section, values
):
    trained("tensorboard")
    after = edited(asked(params, "tensorboard"), section, **values)
    locked(after)
    assert missing_views(bare_project / "results", after) == ["tensorboard"]
    add_to_run(bare_project / "results/train/run.json", after, [])
    assert missing_views(bare_project / "results", after) == []
    again = edited(after, "train", learning_rate=0.1)
    assert missing_views(bare_project / "results", again) == []


def test_a_stage_that_ran_before_the_training_tells_nothing_of_its_results(bare_project, trained, params):
    trained("tensorboard")
    stages = {
        "train": {"cmd": "x", "outs": [{"path": "model", "md5": "b"}]},
        "evaluate": {
            "cmd": "x",
            "deps": [{"path": "model", "md5": "a"}],
            "params": {"params.yaml": {"evaluate": {"stride": 16}}},
        },
    }
    write_json(bare_project / "dvc.lock", {"schema": "2.0", "stages": stages})
    assert missing_views(bare_project / "results", asked(params, "tensorboard")) == []


def test_the_doctor_and_the_report_name_the_command(bare_project, trained):
    path = bare_project / "params.yaml"
    path.write_text(path.read_text().replace("trackers: [aim]", "trackers: [wandb]"))
    trained()
    command = "python -m dsv3.tracking.rebuild --tracker wandb"
    assert str(check_views()).endswith(f"wandb does not show the results that are checked out; run: {command}")
    (bare_project / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    assert f"Not shown in wandb\n  {command}  shows it" in report(bare_project / "dvc.yaml")

import os
import shutil
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from dsv3.artifacts import read_json, write_json
from dsv3.errors import UserError
from dsv3.tracking.aim import AimTracker
from dsv3.tracking.rebuild import main, rebuild
from dsv3.tracking.recorder import open_recorder
from dsv3.tracking.results import read_table
from dsv3.tracking.revision import applied_experiment
from dsv3.tracking.shown import missing_views
from dsv3.tracking.tracker import load_tracker
from tests.committed import DEFAULTS

PAGE = """# Samples

## `To be`

```text
To be or
```
"""
SCORES = {"nats_per_token": 4.0, "perplexity": 54.6, "nats_per_char": 1.5, "bits_per_byte": 2.2}


@pytest.fixture
def results(project, identity, params):
    """What a training and an evaluation leave behind, and their run in Aim."""
    runtime = params.runtime.model_copy(update={"trackers": ["aim"]})
    folder = project / "results"
    recorder = open_recorder(folder / "train", runtime, identity)
    recorder.log("history", {"step": 10, "loss": 4.0})
    recorder.log("history", {"step": 20, "loss": 3.5, "grad_norm": 1.0})
    recorder.log("router", {"step": 20, "layer": 1, "max_vio": 0.5})
    recorder.log("fp8", {"step": 20, "module": "model", "operand": "weight", "nonzero_grad_share": 1.0})
    write_json(folder / "train" / "run.json", recorder.run_record())
    write_json(folder / "train" / "metrics.json", {"loss": 3.5})
    recorder.close("finished")
    write_json(folder / "evaluate" / "metrics.json", {"heldout": SCORES})
    (folder / "evaluate" / "expert_load.tsv").write_text("layer\texpert\tload_share\n1\t0\t0.25\n1\t1\t0.75\n")
    (project / "samples.md").write_text(PAGE)
    return folder


def test_a_lost_run_is_built_again_from_its_results(project, results, params, indexed):
    from aim.storage.context import Context

    (before,) = indexed(project).iter_runs()
    shutil.rmtree(project / ".aim")
    run_hash = rebuild(results, project / "samples.md", params, AimTracker(str(project)))
    (run,) = indexed(project).iter_runs()
    assert run.hash == run_hash == before.hash
    assert (run.name, run.experiment) == (before.name, before.experiment)
    assert run["params"] == before["params"]
    assert run["train", "loss"] == 3.5
    steps, (losses, *_) = run.get_metric("loss", Context({"subset": "train"})).data.numpy()
    assert (steps.tolist(), losses.tolist()) == ([10, 20], [4.0, 3.5])
    assert run.get_metric("max_vio", Context({"subset": "train", "layer": 1})) is not None
    operand = Context({"subset": "train", "module": "model", "operand": "weight"})
    assert run.get_metric("nonzero_grad_share", operand) is not None
    assert run.get_metric("nats_per_char", Context({"subset": "heldout", "stage": "evaluate"})) is not None
    load = run.get_distribution_sequence("load_share", Context({"subset": "heldout", "layer": 1}))
    assert load.values.sparse_list()[1][0].weights.tolist() == [0.25, 0.75]
    text = run.get_text_sequence("sample", Context({"prompt": "To be"}))
    assert text.values.sparse_list()[1][0].data == "To be or"


def test_a_run_that_aim_still_has_is_completed_not_doubled(project, results, params, indexed):
    (before,) = indexed(project).iter_runs()
    assert rebuild(results, project / "samples.md", params, AimTracker(str(project))) == before.hash
    (run,) = indexed(project).iter_runs()
    assert run["evaluate", "heldout", "nats_per_char"] == 1.5
    assert run.end_time == before.end_time  # nor stretched


def test_a_training_that_aim_has_not_seen_is_one_run_of_it_however_often_it_is_rebuilt(
    project, results, params, indexed
):
    shutil.rmtree(project / ".aim")
    record = read_json(results / "train" / "run.json")
    write_json(results / "train" / "run.json", {**record, "aim_run_hash": None})
    asked = params.model_copy(update={"runtime": params.runtime.model_copy(update={"trackers": ["aim"]})})
    assert missing_views(results, asked) == ["aim"]
    first, second = (rebuild(results, project / "samples.md", asked, AimTracker(str(project))) for _ in range(2))
    (run,) = indexed(project).iter_runs()
    assert run.hash == first == second
    assert missing_views(results, asked) == []


def test_fp8s_curves_of_each_operand_come_with_a_rebuild_after_they_are_asked_for(project, results, params, indexed):
    rows = ["step\tmodule\toperand\trelative_error", "20\tmodel\tinput\t0.1", "20\tmodel.lm_head\tinput\t0.2"]
    (results / "train" / "fp8.tsv").write_text("\n".join(rows) + "\n")
    for is_asked, shown in ((False, ["model"]), (True, ["model", "model.lm_head"])):
        runtime = params.runtime.model_copy(update={"track_fp8_operands": is_asked})
        rebuild(results, project / "samples.md", params, load_tracker("aim", runtime))
        (run,) = indexed(project).iter_runs()
        assert sorted(curve.context["module"] for curve in run.metrics() if curve.name == "relative_error") == shown


def test_an_applied_experiment_of_other_evaluation_parameters_is_not_written_over_the_trainings_run(
    project, results, params, indexed, monkeypatch
):
    (before,) = indexed(project).iter_runs()
    monkeypatch.delenv("DVC_EXP_NAME")
    monkeypatch.chdir(project)
    commit = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "commit", "-q", "-a", "-m", "m"]
    subprocess.run(["git", "init", "-q"], check=True)
    (project / "dvc.lock").write_text("baseline")
    subprocess.run(["git", "add", "dvc.lock"], check=True)
    subprocess.run(commit, check=True)
    assert applied_experiment() is None
    (project / "dvc.lock").write_text("experiment")
    subprocess.run(commit, check=True)
    subprocess.run(["git", "update-ref", "refs/exps/ab/cdef/wide", "HEAD"], check=True)
    subprocess.run(["git", "reset", "-q", "--soft", "HEAD~"], check=True)
    other = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"stride": 16})})
    run_hash = rebuild(results, project / "samples.md", other, AimTracker(str(project)))
    runs = {run.hash: run for run in indexed(project).iter_runs()}
    assert set(runs) == {before.hash, run_hash}
    assert runs[before.hash].get("evaluate") is None
    assert runs[run_hash].name.startswith("wide")
    assert rebuild(results, project / "samples.md", other, AimTracker(str(project))) == run_hash


def test_parameters_that_were_edited_and_not_run_make_no_run(project, results, params, indexed):
    (before,) = indexed(project).iter_runs()
    train = params.train.model_copy(update={"learning_rate": 0.1})
    edited = params.model_copy(update={"train": train})
    assert rebuild(results, project / "samples.md", edited, AimTracker(str(project))) == before.hash
    (run,) = indexed(project).iter_runs()
    assert run["params", "train", "learning_rate"] == params.train.learning_rate


@pytest.mark.parametrize("chosen", [[], ["--tracker", "tensorboard"]])
def test_the_command_rebuilds_the_trackers_of_the_parameters_or_the_named_ones(project, results, chosen, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("dsv3.tracking.rebuild.read_params", lambda path: DEFAULTS)
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, [*chosen, "--results", str(results)])
    assert done.exit_code == 0, done.output
    assert (project / "runs").is_dir() == bool(chosen)
    assert done.output.startswith("tensorboard: " if chosen else "aim: ")


def test_a_tracker_that_cannot_be_imported_is_a_mistake_here(project, results, monkeypatch):
    monkeypatch.setattr("dsv3.tracking.rebuild.read_params", lambda path: DEFAULTS)
    monkeypatch.delitem(sys.modules, "dsv3.tracking.wandb", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"tracker wandb can't be imported .*; pip install -c constraints\.txt wandb"):
        main("wandb", results)


PICTURE = "evaluate/figures/loss_by_position.png"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("samples.md", b"caf\xe9"),
        *(
            (f"results/train/{table}.tsv", content)
            for table in ("history", "router")
            for content in (b"\xff", b"loss\n1.0\n", b"step\tloss\n\t1.0\n", b"step\tloss\nnan\t1\n", b"a\tb\n1\t2\n")
        ),
        ("results/train/history.tsv", b"step\tloss\ninf\t1\n"),
        ("results/train/router.tsv", b"step\tlayer\tload_shares\n1\t1\ta b\n"),
        ("results/train/fp8.tsv", b"step\tmodule\trelative_error\n1\tmodel\t0.1\n"),
        *(("results/evaluate/expert_load.tsv", content) for content in (b"layer\texpert\n1\t0\n", b"layer\n\xff\n")),
        *(
            ("results/evaluate/metrics.json", content)
            for content in (b"[]", b"3", b"{", b"\xff", b'{"heldout": 3}', b'{"heldout": {"perplexity": "x"}}')
        ),
        ("results/train/metrics.json", b"[]"),
        ("results/train/run.json", b"{}"),
        *((f"results/{PICTURE}", content) for content in (b"", b"no picture", b"\x89PNG\r\n\x1a\n")),
    ],
)
def test_results_that_are_damaged_are_one_line(project, results, params, name, content):
    pytest.importorskip("tensorboard")
    (project / name).parent.mkdir(exist_ok=True)
    (project / name).unlink(missing_ok=True)
    (project / name).write_bytes(content)
    with pytest.raises(UserError, match=r"; dvc checkout brings an output back, dvc repro makes it$") as error:
        rebuild(results, project / "samples.md", params, load_tracker("tensorboard", params.runtime))
    assert name.rpartition("/")[2] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["samples.md", "results/train/history.tsv"])
def test_a_pipe_in_the_place_of_results_is_none_and_is_not_waited_for(project, results, params, name):
    pytest.importorskip("tensorboard")
    (project / name).unlink()
    os.mkfifo(project / name)
    rebuild(results, project / "samples.md", params, load_tracker("tensorboard", params.runtime))


def test_empty_cells_are_left_out(results):
    assert read_table(results / "train" / "history.tsv", ["step"]) == [
        {"step": 10.0, "loss": 4.0},
        {"step": 20.0, "loss": 3.5, "grad_norm": 1.0},
    ]
    assert read_table(results / "nothing.tsv", ["step"]) == []


def test_without_a_training_there_is_nothing_to_build(tmp_path, params):
    with pytest.raises(UserError, match=r"run\.json: no such file; run dvc repro train"):
        rebuild(tmp_path, tmp_path / "samples.md", params, AimTracker(str(tmp_path)))

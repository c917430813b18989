import json
import subprocess
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from dsv3.artifacts import write_json
from dsv3.params.read import Params
from dsv3.tracking.identity import later_identity, native, project_root, run_identity
from dsv3.tracking.revision import changed_params, git


def test_the_experiments_name_of_dvc_is_the_runs_name(identity, params):
    assert identity.name == "union-brig"
    assert identity.dvc["exp_name"] == "union-brig"
    assert identity.experiment == "config_nano"
    assert identity.tags == ("config_nano", "plays", params.train.optim, "bf16")


def test_without_dvc_the_run_is_named_after_the_workspaces_commit(params, monkeypatch, tmp_path):
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert run_identity(params, "f", {}, {}, {}, {}).name == "workspace-untracked"
    subprocess.run(["git", "init", "-q"], check=True)
    author = ["-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    sha = git("rev-parse", "HEAD")
    assert sha is not None
    assert run_identity(params, "f", {}, {}, {}, {}).name == f"workspace-{sha[:7]}"


def test_dirty_means_changed_code_not_changed_results_or_what_the_run_records_whole(params, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "mini_model").mkdir()
    for name in ("code.py", "results/metrics.json", "dvc.lock", "params.yaml", params.model.config):
        Path(name).write_text("1")
    subprocess.run(["git", "add", "."], check=True)
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@x", "commit", "-q", "-m", "m"], check=True)
    Path("results/metrics.json").unlink()
    for name in ("dvc.lock", "params.yaml", params.model.config):
        Path(name).write_text("2")
    assert run_identity(params, "f", {}, {}, {}, {}).dvc["git_dirty"] is False
    Path("code.py").write_text("2")
    assert run_identity(params, "f", {}, {}, {}, {}).dvc["git_dirty"] is True


def test_the_experiment_parameter_wins_over_the_configurations_name(params):
    runtime = params.runtime.model_copy(update={"experiment": "fp8 or not"})
    assert run_identity(params.model_copy(update={"runtime": runtime}), "f", {}, {}, {}, {}).experiment == "fp8 or not"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (True, True),
        (Path("a/b"), "a/b"),
        (date(2024, 1, 2), "2024-01-02"),
        (2**70, str(2**70)),
        ({"a": (1, {"b": None})}, {"a": [1, {"b": None}]}),
        (np.float64(0.25), 0.25),
        (np.bool_(True), True),
    ],
)
def test_native_gives_only_what_every_tracker_stores(value, expected):
    assert native(value) == expected
    assert type(native(value)) is type(expected)
    json.dumps(native(value))


def test_shared_files_lie_in_dvcs_root_else_beside_dot_dvc(monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_ROOT", "/somewhere")
    assert project_root() == Path("/somewhere")
    monkeypatch.delenv("DVC_ROOT")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert project_root() == tmp_path
    (tmp_path / ".dvc").rmdir()
    assert project_root() == tmp_path / "a" / "b"


@pytest.fixture
def committed(params, tmp_path, monkeypatch) -> Params:
    """Parameters that are those of the commit in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_EXP_BASELINE_REV", raising=False)
    write_json(tmp_path / "params.yaml", params.model_dump())
    write_json(tmp_path / params.model.config, {"n_routed_experts": 8, "topk_group": 1})
    commands = ["init -q", "add .", "-c user.name=n -c user.email=e@x commit -q -m m"]
    for command in commands:
        subprocess.run(["git", *command.split()], check=True)
    return params


def test_changes_are_the_parameters_and_fields_of_the_architecture_that_differ_from_the_commit(committed):
    values = native(committed.model_dump())
    values["train"]["use_fp8"] = True
    values["sample"]["prompts"] = ["To be"]
    values["runtime"]["logging_steps"] = 1  # shapes nothing
    architecture = {"n_routed_experts": 16, "topk_group": 1, "not_in_the_commit": 1}
    expected = {"train.use_fp8": True, "sample.prompts": ["To be"], "n_routed_experts": 16}
    assert changed_params(values, architecture) == expected
    values["model"]["config"] = "mini_model/config_tiny.json"
    assert "n_routed_experts" not in changed_params(values, architecture)


def test_what_trackers_are_shown_is_one_line_each(identity, params):
    runtime = params.runtime.model_copy(update={"experiment": "two\nlines"})
    shown = run_identity(
        params.model_copy(update={"runtime": runtime}), "f", {}, {"corpus": {"source": "a\nb"}}, {}, {}
    )
    assert (shown.experiment, shown.tags[1]) == ("two lines", "a b")
    changed = replace(identity, changes={"data.path": "a\nb", "sample.prompts": ["a\nb"]})
    assert changed.change_tags == ["data.path: a b", 'sample.prompts: ["a\\nb"]']
    assert "\n" not in changed.title


def test_nothing_differs_outside_of_a_repository_or_from_a_commit_without_parameters(params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert changed_params(native(params.model_dump()), {"n_routed_experts": 16}) == {}


def test_a_later_stage_of_the_same_parameters_adds_to_the_trainings_run_under_any_commit(identity, params):
    quiet = params.model_copy(update={"runtime": params.runtime.model_copy(update={"trackers": []})})
    assert later_identity(identity, quiet, "union-brig") is identity
    assert later_identity(identity, quiet, None) is identity


def test_a_later_stage_of_another_experiment_or_of_other_parameters_has_a_run_of_its_own(identity, params):
    sample = params.model_copy(update={"sample": params.sample.model_copy(update={"top_k": 5})})
    own = [later_identity(identity, *case) for case in ((params, "b"), (sample, None), (sample, "union-brig"))]
    assert len({identity.key, *(run.key for run in own)}) == 4
    assert [run.name for run in own][::2] == ["b", "union-brig"]
    assert own[1].params["sample"]["top_k"] == 5
    assert own[1].dvc["fingerprint"] == identity.dvc["fingerprint"]
    assert later_identity(identity, sample, "union-brig") == own[2]

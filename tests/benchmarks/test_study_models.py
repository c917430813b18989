"""A teacher's model comes from DVC itself: what it names experiments, and what it copies of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo

from benchmarks.studies.training import MODEL, MODELS, Job, experiments, train

WRITE = "import pathlib, sys; p = pathlib.Path('outputs/final_model'); p.mkdir(parents=True); (p / 'w').write_text({})"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of DVC whose one stage writes a model that holds its seed and its teachers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    subprocess.run(["git", "init", "-q"], check=True)
    for name, value in (("user.name", "n"), ("user.email", "e@x")):
        subprocess.run(["git", "config", name, value], check=True)
    Repo.init().close()
    code = WRITE.format("pathlib.Path('params.yaml').read_text()")
    stage = {"cmd": f'"{sys.executable}" -c "{code}"', "params": ["seed", "train"], "outs": [MODEL]}
    Path("dvc.yaml").write_text(json.dumps({"stages": {"train": stage}}))
    Path("params.yaml").write_text("seed: 1\ntrain:\n  teachers: []\n")
    Path(".gitignore").write_text("/outputs\n")
    for arguments in (["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", *arguments], check=True)
    return tmp_path


def test_a_student_reads_the_models_of_its_teachers_experiments_and_not_the_workspaces(repository):
    Path(MODEL).mkdir(parents=True)
    Path(MODEL, "w").write_text("the workspace's")
    jobs = {"student": Job(["-S", "seed=4"], ["first", "second"])}
    jobs |= {name: Job(["-S", f"seed={seed}"]) for name, seed in (("first", 2), ("second", 3))}
    train(jobs, num_at_once=1, num_threads=1, message="how")
    assert experiments() == {"first", "second", "student"}
    models = sorted(MODELS.iterdir())
    assert [path.name.rpartition("-")[0] for path in models] == ["first", "second"]
    for seed, model in enumerate(models, start=2):
        assert f"seed: {seed}" in (model / "w").read_text()
    shown = subprocess.run(["dvc", "exp", "show", "--json"], capture_output=True, text=True, check=True).stdout
    assert str(models[0]) in shown and str(models[1]) in shown

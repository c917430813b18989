"""No test depends on whether the pipeline has run here, nor with which parameters: what a run writes is not opened."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.committed import BASELINE, MODELS, PROJECT, ROOT, committed_text, is_written
from tests.contracts.test_dvc_yaml import STAGES, outputs_of

WRITTEN = ["params.yaml", "dvc.lock", *MODELS, "results/train/metrics.json", ".aim/VERSION", "data/tokens/meta.json"]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_run_writes_is_refused_to_a_test(name: str, tmp_path: Path):
    (tmp_path / "link").symlink_to(ROOT)
    for path in (ROOT / name, tmp_path / "link" / name, Path(os.path.relpath(ROOT / name))):
        with pytest.raises(AssertionError, match=r"tests\.committed has Git's"):
            path.open()
    with pytest.raises(AssertionError, match=r"tests\.committed has Git's"):
        os.open(ROOT / name, os.O_RDONLY)


def test_whatever_a_stage_writes_is_refused():
    outputs = set().union(*(outputs_of(stage) for stage in STAGES.values()))
    assert [path for path in outputs if not is_written(path)] == []


def test_code_and_folders_of_tests_are_not_refused(tmp_path: Path):
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    assert (ROOT / "dvc.yaml").read_text() and (PROJECT / "params.yaml").read_text()
    assert not is_written("dsv3/results.py") and not is_written("params.yaml.md")


def test_values_are_a_commits_and_the_code_the_working_trees():
    code = "mini_model/modeling_deepseek.py"
    assert (PROJECT / code).read_text() == (ROOT / code).read_text()
    for name in ("params.yaml", *MODELS):
        assert (PROJECT / name).read_text() in {committed_text(name, BASELINE), committed_text(name)}


def test_a_baseline_of_yours_does_not_change_what_tests_start_from(tmp_path: Path):
    """In a clone on no branch, with values of its own that are committed, staged and neither."""
    copy = tmp_path / "copy"

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def change_values() -> None:
        for name in ("params.yaml", *MODELS):
            text = (copy / name).read_text()
            (copy / name).write_text(text.replace("seed: ", "seed: 9").replace('"hidden_size": ', '"hidden_size": 1'))

    values = (
        "from tests.committed import *; print(BASELINE, DEFAULTS, *[(PROJECT / name).read_text() for name in MODELS])"
    )
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(copy)], check=True)
    run("git", "switch", "--quiet", "--detach")
    shutil.copy(ROOT / "tests/committed.py", copy / "tests")
    first = run(sys.executable, "-c", values)
    change_values()
    run("git", "-c", "user.name=n", "-c", "user.email=e@x", "commit", "--quiet", "--all", "--message", "my baseline")
    assert run(sys.executable, "-c", values) == first
    change_values()
    run("git", "add", "--all")
    change_values()
    assert run(sys.executable, "-c", values) == first

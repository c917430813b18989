"""No test depends on whether the pipeline has run here, nor with which parameters: what a run writes is not opened."""

import os
from pathlib import Path

import pytest

from tests.committed import MODELS, PROJECT, ROOT, RUNS_WRITE, committed_text, is_written
from tests.contracts.test_dvc_yaml import STAGES, outputs_of

WRITTEN = ["params.yaml", "dvc.lock", *MODELS, "results/train/metrics.json", ".aim/VERSION", "data/tokens/meta.json"]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_run_writes_is_refused_to_a_test(name: str, tmp_path: Path):
    (tmp_path / "link").symlink_to(ROOT)
    for path in (ROOT / name, tmp_path / "link" / name, Path(os.path.relpath(ROOT / name))):
        with pytest.raises(AssertionError, match=r"tests\.committed has Git's"):
            path.open()


def test_whatever_a_stage_writes_is_refused():
    outputs = set().union(*(outputs_of(stage) for stage in STAGES.values()))
    assert [path for path in outputs if not is_written(path)] == []


def test_code_and_folders_of_tests_are_not_refused(tmp_path: Path):
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    assert (ROOT / "dvc.yaml").read_text() and (PROJECT / "params.yaml").read_text()
    assert not is_written("dsv3/results.py") and not is_written("params.yaml.md")


def test_a_model_is_gits_and_its_code_the_working_trees():
    assert {name: (PROJECT / name).read_text() for name in MODELS} == {name: committed_text(name) for name in MODELS}
    code = "mini_model/modeling_deepseek.py"
    assert (PROJECT / code).read_text() == (ROOT / code).read_text()
    assert {"results", "params.yaml"} <= set(RUNS_WRITE)

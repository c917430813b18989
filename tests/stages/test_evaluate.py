import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.exported_model import edit_json, run_stage, set_params, write_exported


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_exported(folder, runtime={"trackers": ["aim"]})
    return folder


@pytest.fixture(scope="module")
def evaluated(prepared) -> Path:
    done = run_stage("evaluate", prepared)
    assert done.returncode == 0, done.stderr
    return prepared


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    set_params(folder, runtime={"trackers": []})
    return folder


def test_it_writes_metrics_tables_and_figures(evaluated):
    output = evaluated / "evaluate"
    metrics = json.loads((output / "metrics.json").read_text())
    meta = json.loads((evaluated / "tokens" / "meta.json").read_text())
    for split in ("validation", "test"):
        assert metrics[split]["tokens"] == meta["splits"][split]["tokens"] - 1
        assert metrics[split]["characters"] == meta["splits"][split]["characters"]
    assert metrics["heldout"]["tokens"] == metrics["validation"]["tokens"] + metrics["test"]["tokens"]
    assert 5 < metrics["heldout"]["nats_per_token"] < 6.5  # random weights: about ln 272 = 5.6
    assert metrics["router"]["num_layers"] == 1
    assert len((output / "loss_by_position.tsv").read_text().splitlines()) == 1 + 32
    assert len((output / "expert_load.tsv").read_text().splitlines()) == 1 + 4
    for name in ("loss_by_position", "expert_load"):
        with Image.open(output / "figures" / f"{name}.png") as image:
            assert image.width > 300


def test_it_adds_to_the_run_of_run_json_or_to_a_new_one(evaluated):
    runs = list((evaluated / ".aim" / "meta" / "chunks").iterdir())
    assert len(runs) == 1


def test_a_second_evaluation_gives_the_same_files(evaluated, tmp_path):
    done = run_stage("evaluate", evaluated, output=str(tmp_path / "again"))
    assert done.returncode == 0, done.stderr
    files = [path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (evaluated / "evaluate" / file).read_bytes(), file


def test_dry_run_prints_the_plan_and_writes_nothing(copy):
    before = sorted(copy.rglob("*"))
    done = run_stage("evaluate", copy, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "tokens of validation and test on cpu, windows of 32 moved by 16" in done.stdout
    assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "final_model" / "config.json").unlink(), "holds no config.json, so no model"),
        (lambda folder: edit_json(folder / "final_model" / "config.json", auto_map={}), "names no code of its own"),
        (lambda folder: (folder / "run.json").unlink(), "run.json: no such file; run dvc repro train"),
        (lambda folder: (folder / "tokens" / "test_00000.bin").unlink(), "test_00000.bin: no such token shard"),
        (lambda folder: edit_json(folder / "tokens" / "meta.json", vocab_size=300), "vocabulary of 300"),
        (lambda folder: set_params(folder, evaluate={"stride": 33}), "evaluate.stride is 33"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(copy, damage, message):
    damage(copy)
    done = run_stage("evaluate", copy)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (copy / "evaluate").exists()

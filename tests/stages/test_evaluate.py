import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dsv3.errors import UserError
from stages import evaluate
from tests.exported_model import edit_json, run_without_home, set_params, write_exported


def run(folder: Path, output: Path, dry_run: bool = False) -> None:
    inputs = {"model": folder / "final_model", "tokens": folder / "tokens", "run": folder / "run.json"}
    with contextlib.chdir(folder):
        evaluate.main(**inputs, output=output, params=folder / "params.yaml", dry_run=dry_run)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_exported(folder)
    return folder


@pytest.fixture(scope="module")
def output(prepared) -> Path:
    run(prepared, prepared / "evaluate")
    return prepared / "evaluate"


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    shutil.copytree(prepared, tmp_path / "copy")
    return tmp_path / "copy"


def test_it_writes_metrics_tables_and_figures(prepared, output):
    metrics = json.loads((output / "metrics.json").read_text())
    meta = json.loads((prepared / "tokens" / "meta.json").read_text())
    for split in ("validation", "test"):
        assert metrics[split]["tokens"] == meta["splits"][split]["tokens"] - 1
        assert metrics[split]["characters"] == meta["splits"][split]["characters"]
    assert metrics["heldout"]["tokens"] == metrics["validation"]["tokens"] + metrics["test"]["tokens"]
    assert 5 < metrics["heldout"]["nats_per_token"] < 6.5  # random weights: about ln 272 = 5.6
    assert metrics["router"]["num_layers"] == 2  # that of the MTP module too
    assert metrics["mtp"]["depth_1"]["tokens"] == metrics["heldout"]["tokens"] - 2  # a first target of each split less
    assert len((output / "loss_by_position.tsv").read_text().splitlines()) == 1 + 32
    assert len((output / "expert_load.tsv").read_text().splitlines()) == 1 + 2 * 4
    for name in ("loss_by_position", "expert_load"):
        with Image.open(output / "figures" / f"{name}.png") as image:
            assert image.width > 300


def test_an_earlier_evaluation_is_replaced(prepared, output, tmp_path):
    shutil.copytree(output, tmp_path / "evaluate")
    run(prepared, tmp_path / "evaluate")


def test_no_home_is_needed(copy):
    inputs = ["--model", "final_model", "--tokens", "tokens", "--run", "run.json", "--output", "evaluate"]
    done = run_without_home("evaluate", copy, *inputs)
    assert done.returncode == 0, done.stderr
    assert (copy / "evaluate" / "metrics.json").is_file()


def test_numbers_of_another_stage_are_kept(copy):
    results = copy / "results" / "train"
    results.mkdir(parents=True)
    for name in ("metrics.json", "history.tsv"):
        (results / name).write_text("the training's")
    with pytest.raises(UserError, match=r"train: holds metrics\.json, which would be replaced, beside history\.tsv"):
        run(copy, results)
    assert (results / "metrics.json").read_text() == "the training's"


def test_a_second_evaluation_gives_the_same_files(prepared, output, tmp_path):
    run(prepared, tmp_path)
    files = [path.relative_to(output) for path in output.rglob("*") if path.is_file()]
    assert len(files) == 6
    for file in files:
        assert (tmp_path / file).read_bytes() == (output / file).read_bytes(), file


def test_the_acceptance_is_printed_and_absent_where_there_is_no_prediction_module(prepared, tmp_path, capsys):
    run(prepared, tmp_path / "with")
    assert re.search(r"^mtp depth_1  \d+\.\d% accepted, 5\.\d{4} nats/token$", capsys.readouterr().out, re.MULTILINE)
    write_exported(tmp_path, architecture={"num_nextn_predict_layers": 0})
    run(tmp_path, tmp_path / "without")
    assert list(json.loads((tmp_path / "without" / "metrics.json").read_text())) == [
        "validation",
        "test",
        "heldout",
        "router",
    ]
    assert "mtp" not in capsys.readouterr().out


def test_it_adds_to_the_trainings_run_in_aim_or_to_a_new_one(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(copy))
    pytest.importorskip("aim", reason="Aim has no wheels for this Python")
    set_params(copy, runtime={"trackers": ["aim"]})
    run(copy, tmp_path / "output")
    assert len(list((copy / ".aim" / "meta" / "chunks").iterdir())) == 1


def test_dry_run_prints_the_plan_and_writes_nothing(prepared, tmp_path, capsys):
    run(prepared, tmp_path / "output", dry_run=True)
    assert "tokens of validation and test on cpu, windows of 32 moved by 16" in capsys.readouterr().out
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "final_model" / "config.json").unlink(),
            r"holds no config\.json; run dvc repro train",
        ),
        (
            lambda folder: edit_json(folder / "final_model" / "config.json", auto_map={"AutoConfig": "evil/repo--x.Y"}),
            "code in a model's folder is not run",
        ),
        (lambda folder: (folder / "run.json").unlink(), r"run\.json: no such file; run dvc repro train"),
        (lambda folder: (folder / "tokens" / "test_00000.bin").unlink(), r"test_00000\.bin: can.t be read"),
        (
            lambda folder: edit_json(folder / "tokens" / "meta.json", vocab_size=300),
            "vocabulary of 300; must be <= 272",
        ),
        (lambda folder: set_params(folder, evaluate={"stride": 33}), r"evaluate\.stride is 33"),
        (
            lambda folder: edit_json(folder / "final_model" / "tokenizer.json", added_tokens=[]),
            r"tokenizer\.json is not that of .*tokens; name its own token data by --tokens",
        ),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(copy, tmp_path, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message):
        run(copy, tmp_path / "output")
    assert not (tmp_path / "output").exists()

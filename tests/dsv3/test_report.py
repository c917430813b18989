import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.artifacts import write_json
from dsv3.errors import UserError
from dsv3.report import report, stage_outputs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pipeline(tmp_path) -> Path:
    """dvc.yaml in a folder where every stage has run."""
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    folder = tmp_path / "results"
    write_json(folder / "estimate_size" / "metrics.json", {"parameters_total": 4268800, "parameters_active": 2499328})
    record = {
        "aim_run_hash": "abc",
        "name": "union-brig",
        "experiment": "deepseek-v3",
        "tags": [],
        "fingerprint": "f1",
        "step": 400,
        "params": {"model": {"config": "mini_model/config_nano.json"}},
        "dvc": {"git_sha": "0123456789abcdef", "git_dirty": False, "data_source": "plays"},
        "env": {},
        "size": {},
    }
    write_json(folder / "train" / "run.json", record)
    train = {"tokens_seen": 1500000, "step": 400, "epoch": 4.0, "device": "cpu", "num_processes": 1}
    train |= {"precision": "fp32", "tokens_per_s": 8123.4, "train_s": 190.2}
    write_json(folder / "train" / "metrics.json", train)
    heldout = {"nats_per_char": 1.6123, "bits_per_byte": 2.3261, "nats_per_token": 4.7, "perplexity": 109.9}
    router = {"max_vio_global_max": 0.12, "dead_experts": 0}
    write_json(
        folder / "evaluate" / "metrics.json",
        {"heldout": heldout, "router": router, "mtp": {"depth_1": {"mtp_acceptance": 0.612}}},
    )
    for first, *_ in stage_outputs(tmp_path / "dvc.yaml").values():
        if not first.exists():
            write_json(first, {})
    return tmp_path / "dvc.yaml"


def test_the_table_holds_what_a_newcomer_asks_for(pipeline):
    text = report(pipeline)
    for expected in (
        "mini_model/config_nano.json",
        "4,268,800 (2,499,328 active per token)",
        "plays",
        "union-brig (Aim abc)",
        "0123456789ab\n",
        "1,500,000 in 400 steps, 4.00 epochs",
        "cpu x 1, fp32",
        "8,123 tokens/s; 3 min 10 s in all",
        "1.6123 nats/char, 2.3261 bits/byte",
        "61.2% of its drafts would be accepted",
        "MaxVio 0.120 in the worst layer, 0 dead experts",
        "make ui",
        "dvc exp run -S",
    ):
        assert expected in text
    assert "Not yet there" not in text


def test_missing_results_name_the_stage_that_has_not_run(pipeline):
    for stage in ("evaluate", "sample"):
        stage_outputs(pipeline)[stage][0].unlink()
    text = report(pipeline)
    assert "has not run" in text
    assert "dvc repro evaluate" in text
    assert "dvc repro sample" in text
    assert "dvc repro train" not in text
    assert "held-out" not in text


def test_a_stage_is_known_by_its_first_output_and_by_its_metrics_only_where_it_has_no_other(tmp_path):
    metrics = [{"m.json": {"cache": False}}, "n.json"]  # Git holds them: they are there in a clone, too
    stages = {"a": {"outs": ["x", "y"]}, "b": {"metrics": metrics, "outs": ["x"]}, "c": {"metrics": metrics}}
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    paths = {"a": ["x", "y"], "b": ["x", "m.json", "n.json"], "c": ["m.json", "n.json"]}
    expected = {stage: [tmp_path / name for name in names] for stage, names in paths.items()}
    assert stage_outputs(tmp_path / "dvc.yaml") == expected


DAMAGES = {
    "another type": "3",
    "a list": "[]",
    "cut off": "{",
    "texts for numbers": lambda text: text.replace(": ", ': "x').replace(",\n", '",\n').replace("\n}", '"\n}'),
    "numbers for mappings": '{"heldout": 1, "router": 2, "mtp": 3, "params": 4, "dvc": 5, "parameters_total": {}}',
    "not UTF-8": b'{"a": "\xff"}',
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["train/run.json", "train/metrics.json", "evaluate/metrics.json", "estimate_size/metrics.json"]
)
def test_results_that_are_damaged_are_one_line_with_the_remedy(pipeline, name, damage):
    path, content = pipeline.parent / "results" / name, DAMAGES[damage]
    content = content(path.read_text()) if callable(content) else content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        UserError, match=r"\.json: .*; dvc checkout brings an output back, dvc repro makes it$"
    ) as error:
        report(pipeline)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("{}", "stages: "),
        ("[]", "the file: "),
        ("stages: 5", "stages: "),
        ("stages: {a: 3}", "stages.a: "),
        ("stages: {a: {outs: 3}}", "stages.a.outs: "),
        ("stages: {a: {outs: [3]}}", "stages.a.outs.0"),
    ],
)
def test_a_pipeline_that_is_none_is_one_line(tmp_path, content, where):
    (tmp_path / "dvc.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        report(tmp_path / "dvc.yaml")
    assert str(error.value).startswith(f"{tmp_path / 'dvc.yaml'}: {where}") and "\n" not in str(error.value)


def test_nothing_at_all_is_no_error(tmp_path):
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    text = report(tmp_path / "dvc.yaml")
    assert not text.startswith("Results")
    assert all(f"dvc repro {stage}" in text for stage in stage_outputs(ROOT / "dvc.yaml"))


def test_the_command_needs_neither_torch_nor_results(tmp_path):
    code = "import sys; import dsv3.report; assert not {'torch', 'transformers', 'aim', 'dvc'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    command = [sys.executable, "-m", "dsv3.report", "--pipeline", str(tmp_path / "dvc.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Where to look next" in done.stdout

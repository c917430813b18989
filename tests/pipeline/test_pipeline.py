"""The pipeline as it is published, run by DVC for real; the tests of this file share one laboratory, in their order."""

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

import pytest

from dsv3.dependencies import TRAIN_VIEWS, VIEWS, dependencies
from dsv3.tracking.metrics import HEADLINE
from tests.pipeline.laboratory import Laboratory
from tests.warm_python import WarmPython

pytestmark = pytest.mark.pipeline

ARTEFACTS = [
    "data/corpus/manifest.json",
    "data/tokens/meta.json",
    "results/estimate_size/metrics.json",
    "results/estimate_size/table.md",
    "outputs/final_model/model.safetensors",
    "outputs/final_model/config.json",
    "outputs/final_model/modeling_deepseek.py",
    "outputs/final_model/tokenizer.json",
    "outputs/final_model/README.md",
    "results/train/metrics.json",
    "results/train/history.tsv",
    "results/train/run.json",
    "results/evaluate/metrics.json",
    "outputs/samples.md",
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """A laboratory whose pipeline has run as it is; what follows runs in forks of a warm Python."""
    lab = Laboratory.at(tmp_path_factory.mktemp("laboratory"))
    lab.run("dvc", "repro")
    lab.commit("Results")
    warm = WarmPython(tmp_path_factory.mktemp("warm"), lab.environment())
    yield Laboratory(lab.root, warm.programs)
    warm.close()


@pytest.fixture
def laboratory(shared: Laboratory) -> Iterator[Laboratory]:
    """The laboratory as it was committed, also after a test that failed or was skipped on its way."""
    yield shared
    if shared.run("git", "status", "--porcelain").stdout:
        shared.restore()


def test_the_pipeline_runs_from_nothing_to_a_model_that_was_scored(laboratory):
    assert [name for name in ARTEFACTS if not (laboratory.root / name).is_file()] == []
    metrics = laboratory.json("results/evaluate/metrics.json")
    assert 0 < metrics["heldout"]["nats_per_char"] < math.log(256)
    assert metrics["heldout"]["characters"] == metrics["validation"]["characters"] + metrics["test"]["characters"]
    stages = ("estimate_size", "train", "evaluate")
    headline = {
        key: value for stage in stages for key, value in laboratory.json(f"results/{stage}/headline.json").items()
    }
    assert set(headline) == set(HEADLINE)
    assert headline["heldout"] == metrics["heldout"]["nats_per_char"]
    assert headline["val_loss"] == laboratory.json("results/train/metrics.json")["validation"]["loss"]
    history = laboratory.rows("results/train/history.tsv")
    loss = history[0].index("loss")
    assert float(history[-1][loss]) < float(history[1][loss])
    assert [path.name for path in laboratory.root.glob(".checkpoints/*/step_*")] == ["step_20"]


def test_nothing_runs_a_second_time(laboratory):
    assert "up to date" in laboratory.run("dvc", "repro").stdout
    assert laboratory.run("git", "status", "--porcelain").stdout == ""


def test_an_edit_of_a_tracker_or_of_another_view_reruns_nothing(laboratory):
    def edit(views: Iterable[str]) -> None:
        for path in (laboratory.root / view for view in views):
            for file in path.glob("*.py") if path.is_dir() else [path]:
                file.write_text(f"{file.read_text()}\n\nEDITED = True\n")

    edit(VIEWS)
    assert "up to date" in laboratory.run("dvc", "status").stdout
    edit(TRAIN_VIEWS)
    assert "up to date" in laboratory.run("dvc", "status", "train", "evaluate", "sample").stdout


def test_a_new_parameter_of_the_training_leaves_what_follows_alone_and_one_of_the_machine_everything(laboratory):
    laboratory.edit("dsv3/params/runtime.py", "    num_processes: int", "    nice: int\n\n    num_processes: int")
    laboratory.edit("params.yaml", "  num_processes: 1", "  nice: 10\n  num_processes: 1")
    assert "up to date" in laboratory.run("dvc", "status").stdout
    laboratory.edit("dsv3/params/train.py", "    max_steps: int", "    z_loss_weight: float\n\n    max_steps: int")
    laboratory.edit("params.yaml", "  max_steps: 20", "  z_loss_weight: 0.0\n  max_steps: 20")
    assert "up to date" in laboratory.run("dvc", "status", "evaluate", "sample").stdout
    assert "changed deps" in laboratory.run("dvc", "status", "train").stdout


def test_another_question_to_the_estimate_runs_the_estimate_only(laboratory):
    result = laboratory.run("dvc", "exp", "run", "-S", "estimate_size.context_tokens=8192")
    assert re.findall(r"Running stage '(\w+)'", result.stdout) == ["estimate_size"]
    size = laboratory.json("results/estimate_size/metrics.json")
    assert size["inference_kv_cache_bytes"] == 8192 * size["inference_kv_cache_bytes_per_token"]


def test_a_memory_budget_stops_a_training_before_it_starts_or_changes_nothing(laboratory):
    laboratory.set_params({"estimate_size": {"memory_budget_gib": 1000.0}})
    assert re.findall(r"Running stage '(\w+)'", laboratory.run("dvc", "repro").stdout) == ["estimate_size"]
    laboratory.set_params({"estimate_size": {"memory_budget_gib": 0.001}})
    result = laboratory.run("dvc", "repro", "train", status=255)
    assert re.findall(r"Running stage '(\w+)'", result.stdout) == ["estimate_size"]
    assert "estimate_size.memory_budget_gib is 0.001; training needs" in result.stderr


def test_an_experiment_is_a_run_of_its_own_beside_the_first(laboratory, tmp_path):
    laboratory.run("dvc", "exp", "run", "--name", "slower", "-S", "train.learning_rate=0.001")
    runs = laboratory.aim_runs(tmp_path)
    assert "slower" in runs and len(runs) == 2
    assert runs["slower"]["params"]["train"]["learning_rate"] == 0.001
    assert laboratory.json("results/train/run.json")["name"] == "slower"
    table = laboratory.run("dvc", "exp", "show", "--csv", "--only-changed").stdout
    assert "slower" in table
    assert "0.001" in table


def test_an_experiment_stands_beside_its_baseline_on_one_screen(laboratory):
    made = re.search(r"\$\(BIN\)/(dvc exp show .*)", (laboratory.root / "Makefile").read_text())
    assert made
    others = set(laboratory.run("dvc", "exp", "list", "--names-only").stdout.split()) - {"slower"}
    if others:  # of the tests before, with changes of their own
        laboratory.run("dvc", "exp", "remove", *sorted(others))
    for command in (made[1], "dvc exp show --only-changed"):
        shown = laboratory.run("env", "COLUMNS=120", *shlex.split(command), "--no-pager").stdout
        header = next(line for line in shown.splitlines() if "Experiment" in line).split()
        changed = {"val_loss", "heldout", "train.learning_rate"}
        assert changed <= set(header)
        assert "[slower]" in shown and max(map(len, shown.splitlines())) <= 120
        assert command != made[1] or set(header) <= {"Experiment", "train.learning_rate", *HEADLINE}
    assert max(map(len, laboratory.run("env", "COLUMNS=120", "dvc", "metrics", "show").stdout.splitlines())) <= 120


def test_an_experiment_that_does_not_train_leaves_the_trainings_run_alone(laboratory, tmp_path):
    before = laboratory.aim_runs(tmp_path / "before")
    changes = ["-S", "evaluate.stride=48", "-S", "sample.max_new_tokens=6"]
    laboratory.run("dvc", "exp", "run", "--temp", "--name", "evonly", *changes)
    after = laboratory.aim_runs(tmp_path / "after")
    assert set(after) == {*before, "evonly"}
    for name, run in before.items():
        assert after[name]["evaluate"] == run["evaluate"]
        assert after[name].duration == run.duration
    own = after["evonly"]
    assert own["params"]["evaluate"]["stride"] == 48
    assert own["evaluate"]["heldout"] != before[own["dvc"]["training"]]["evaluate"]["heldout"]
    assert own["train"] == before[own["dvc"]["training"]]["train"]
    assert own.description == "evaluate.stride: 48, sample.max_new_tokens: 6"


def test_a_temporary_experiment_reports_into_the_same_aim_repository(laboratory, tmp_path):
    changes = ["-S", "train.optim=adamw", "-S", "mini_model/config_nano.json:kv_lora_rank=24"]
    laboratory.run("dvc", "exp", "run", "--temp", "--name", "aside", *changes)
    runs = laboratory.aim_runs(tmp_path)
    assert {"aside", "slower"} <= set(runs)
    assert runs["aside"]["architecture"]["kv_lora_rank"] == 24
    assert runs["aside"]["dvc"]["git_dirty"] is False  # what -S changes is recorded
    header = laboratory.run("dvc", "exp", "show", "--csv", "--only-changed").stdout.splitlines()[0].split(",")
    assert {"train.optim", "kv_lora_rank"} <= set(header)
    assert "n_routed_experts" not in header
    assert laboratory.run("git", "status", "--porcelain").stdout == ""


def test_experiments_are_held_against_the_last_commit_or_against_each_other(laboratory):
    def compare(*arguments: str) -> str:
        return laboratory.run("python", "-m", "dsv3.report", "compare", *arguments).stdout

    heldout = laboratory.json("results/evaluate/headline.json")["heldout"]
    lines = compare("HEAD", "slower", "aside", "--markdown").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = {name: values for name, *values in cells}
    assert rows[""] == ["HEAD", "slower", "aside"]
    assert rows["train.learning_rate"] == ["0.01", "0.001", "0.01"]
    assert rows["train.optim"] == ["muon", "muon", "adamw"]
    assert rows["kv_lora_rank"][2] == "24"
    assert rows["held-out nats/char"][0] == f"{heldout:.4f}"
    assert "sample.max_new_tokens" not in rows and "runtime.device" not in rows
    assert max(map(len, compare("HEAD", "slower", "aside").splitlines())) <= 80
    assert compare("slower").splitlines()[0].split() == ["HEAD", "slower"]
    assert compare().splitlines()[0].split() == ["HEAD", "workspace"]
    unknown = laboratory.run("python", "-m", "dsv3.report", "compare", "faster", status=2).stderr
    assert unknown == "unknown Git revision 'faster'; dvc exp list names the experiments\n"


def test_a_second_clone_pulls_a_run_and_an_experiment_and_computes_nothing_again(laboratory, tmp_path):
    """docs/sharing.md's commands, with a folder for the storage and a bare repository for the Git server."""
    server, storage = tmp_path / "server.git", tmp_path / "storage"
    clone = Laboratory(tmp_path / "clone", laboratory.programs)
    laboratory.run("git", "init", "--quiet", "--bare", "--initial-branch", "main", str(server))
    laboratory.run("git", "remote", "add", "origin", str(server))  # neither changes a file that Git knows
    laboratory.run("dvc", "remote", "add", "--local", "--default", "storage", str(storage))
    laboratory.run("git", "push", "--quiet", "origin", "main")
    laboratory.run("dvc", "push")
    laboratory.run("dvc", "exp", "push", "origin", "slower")

    laboratory.run("git", "clone", "--quiet", str(server), str(clone.root))
    for place in ("--local", "--project"):  # the experiment's commit has no remote of its own
        clone.run("dvc", "remote", "add", place, "--default", "storage", str(storage))
    clone.commit("A place for the results")
    clone.run("git", "tag", "--annotate", "model@v1.0.0", "--message", "The first one")
    clone.run("git", "push", "--quiet", "--follow-tags", "origin", "main")
    clone.run("dvc", "pull")
    assert "up to date" in clone.run("dvc", "repro").stdout
    own = clone.json("results/evaluate/headline.json")
    clone.run("dvc", "exp", "pull", "origin", "slower")
    clone.run("dvc", "exp", "apply", "slower")
    assert "up to date" in clone.run("dvc", "status").stdout
    pulled = clone.json("results/evaluate/headline.json")
    assert pulled["heldout"] != own["heldout"]
    clone.run("dvc", "repro", "--force", "--single-item", "evaluate")
    assert clone.json("results/evaluate/headline.json") == pulled

    got = tmp_path / "got"
    weights = "model.safetensors"
    laboratory.run("dvc", "artifacts", "get", str(server), "model", "--rev", "v1.0.0", "--out", str(got))
    assert (got / weights).read_bytes() == (laboratory.root / "outputs/final_model" / weights).read_bytes()

    clone.run("python", "-m", "dsv3.tracking.rebuild")
    clone.restore()
    clone.run("python", "-m", "dsv3.tracking.rebuild")
    runs = clone.aim_runs(tmp_path)
    assert sorted(round(run["evaluate"]["heldout"]["nats_per_char"], 6) for run in runs.values()) == sorted(
        round(headline["heldout"], 6) for headline in (own, pulled)
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"train": {"learning_rate": -1}}, "params.yaml: train.learning_rate is -1; must be >= 1e-10"),
        (
            {"train": {"learning_rte": 0.1}},
            "params.yaml: train.learning_rte is no parameter; did you mean learning_rate?",
        ),
        ({"train": {"block_size": "long"}}, "params.yaml: train.block_size is 'long'; input should be a valid integer"),
        ({"tokenize": {"vocab_size": 5000}}, "params.yaml: tokenize.vocab_size is 5000; must be <= 272"),
        ({"model": {"config": "nowhere.json"}}, "model.config: nowhere.json can't be read"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_in_every_stage(laboratory, change, told):
    before = (laboratory.root / "params.yaml").read_text()
    laboratory.set_params(change)
    try:
        result = laboratory.run("python", "-m", "stages.download", "--output", "data/elsewhere", status=2)
        assert result.stderr.startswith(told)
        assert result.stderr.count("\n") == 1
        assert not (laboratory.root / "data/elsewhere").exists()
    finally:
        (laboratory.root / "params.yaml").write_text(before)


def test_after_ctrl_c_the_next_repro_goes_on_to_the_same_weights_whatever_comments_were_written(laboratory, tmp_path):
    longer = {"train": {"max_steps": 120}}
    laboratory.set_params(longer)
    checkpoints = laboratory.root / ".checkpoints"
    shutil.rmtree(checkpoints)  # of trainings that have finished
    process = laboratory.start("dvc", "repro", "train")
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("*/step_*/complete")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (laboratory.root / "outputs/final_model").exists()
    for name in dependencies("train"):
        with (laboratory.root / name).open("a") as file:
            file.write("# Another comment.\n")
    laboratory.set_params({"runtime": {"resume": "must"}})
    resumed = laboratory.run("dvc", "repro", "train")
    steps = [int(row[0]) for row in laboratory.rows("results/train/history.tsv")[1:]]
    assert steps == sorted(set(steps)) and steps[-1] == 120, resumed.stderr

    straight = Laboratory(Laboratory.at(tmp_path / "straight").root, laboratory.programs)
    straight.set_params(longer)
    straight.run("dvc", "repro", "train")
    weights = "outputs/final_model/model.safetensors"
    assert (laboratory.root / weights).read_bytes() == (straight.root / weights).read_bytes()


def test_what_dvc_could_not_keep_is_exported_again_and_not_trained_again(laboratory):
    """As after a full `.dvc/cache`: the stage has ended, DVC has not noted it, and deletes the outputs first."""
    laboratory.set_params({"train": {"max_steps": 11}})
    laboratory.run("dvc", "repro", "train")
    weights = laboratory.root / "outputs/final_model/model.safetensors"
    before = weights.read_bytes(), laboratory.rows("results/train/history.tsv")
    result = laboratory.run("dvc", "repro", "--force", "--single-item", "train")
    assert "finished already: exported again from its last checkpoint" in result.stdout
    assert (weights.read_bytes(), laboratory.rows("results/train/history.tsv")) == before


LOAD = """
import sys, warnings
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, trust = sys.argv[1], sys.argv[2] == "ours"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
assert type(model).__module__.startswith("transformers_modules") == trust, type(model)
batch = tokenizer("ROMEO:", return_tensors="pt")
print(repr(tokenizer.decode(model.generate(**batch, max_new_tokens=8, do_sample=False)[0])))
"""


def test_a_stranger_loads_the_export_with_and_without_its_code_and_reads_the_same(laboratory, tmp_path):
    said = []
    for whose in ("ours", "stock"):
        result = subprocess.run(
            [sys.executable, "-I", "-c", LOAD, str(laboratory.root / "outputs/final_model"), whose],
            cwd=tmp_path,
            env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        said.append(result.stdout)
    assert said[0] == said[1]
    assert "ROMEO:" in said[0]

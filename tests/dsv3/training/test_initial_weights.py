import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockModel

from dsv3.artifacts import read_json
from dsv3.errors import Interrupted, UserError
from dsv3.training import hooks, session
from dsv3.training.loop import Run
from dsv3.training.session import Outputs, run_training
from dsv3.training.setup import prepare_model, run_fingerprint, start_accelerator
from tests.exported_model import broken, edit_json, without, write_exported
from tests.training_inputs import plan_of, run_stage, write_inputs

CPU = torch.device("cpu")
NO_MTP = {"num_nextn_predict_layers": 0}
"""Stock transformers saves no MTP modules."""


@pytest.fixture(autouse=True)
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A model that was exported here, with one MTP module."""
    folder = tmp_path_factory.mktemp("exported")
    write_exported(folder, seed=3)
    return folder / "final_model"


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> StockModel:
    folder = tmp_path_factory.mktemp("ours")
    write_exported(folder, architecture=NO_MTP)
    return StockModel.from_pretrained(folder / "final_model")


def starting_weights(folder: Path, source: Path, **sections: dict) -> dict[str, torch.Tensor]:
    train = {"init_from": str(source), **sections.pop("train", {})}
    model, _ = prepare_model(plan_of(folder, train=train, **sections), CPU)
    return model.state_dict()


def trained(folder: Path, **sections: dict) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    outputs = Outputs(folder / "tokens", folder / "final_model", folder / "results", {"source": "made up"})
    metrics = run_training(plan_of(folder, **sections), outputs)
    assert metrics is not None
    return metrics


def fingerprint_of(folder: Path, **sections: dict) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    plan = plan_of(folder, **sections)
    _, chosen = prepare_model(plan, start_accelerator(plan).device)
    return dict(run_fingerprint(plan, chosen).facts)


@pytest.mark.parametrize("use_fp8", [False, True])
def test_a_training_starts_from_an_exported_models_weights(tmp_path, exported, use_fp8):
    weights = starting_weights(tmp_path, exported, train={"use_fp8": use_fp8})
    stored = load_file(exported / "model.safetensors")
    assert all(torch.equal(weights[name], stored[name]) for name in weights.keys() & stored.keys())
    stacked = torch.stack([stored[f"model.layers.2.mlp.experts.{n}.down_proj.weight"] for n in range(4)])
    assert torch.equal(weights["model.layers.2.mlp.experts.down_proj"], stacked)
    assert weights.keys() == starting_weights_of_none(tmp_path / "none").keys()


def starting_weights_of_none(folder: Path) -> dict[str, torch.Tensor]:
    model, _ = prepare_model(plan_of(folder), CPU)
    return model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_a_training_starts_from_the_weights_of_a_folder_that_stock_transformers_wrote(
    tmp_path, stock, dtype, max_shard_size
):
    stock.to(dtype).save_pretrained(tmp_path / "stock", max_shard_size=max_shard_size)
    assert (len(list((tmp_path / "stock").glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    weights = starting_weights(tmp_path, tmp_path / "stock", architecture=NO_MTP)
    expected = stock.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor.float()) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_going_on_from_a_trained_models_weights_starts_at_its_loss_with_a_schedule_of_its_own(tmp_path):
    trained(tmp_path / "first", train={"max_steps": 30})
    shutil.copytree(tmp_path / "first" / "final_model", tmp_path / "base")
    more = {"init_from": "base", "max_steps": 4, "warmup_ratio": 0.5}  # from the root of the repository
    trained(tmp_path / "second", seed=1, train=more)
    first, second = (
        [line.split("\t") for line in (tmp_path / name / "results" / "history.tsv").read_text().splitlines()]
        for name in ("first", "second")
    )
    loss = first[0].index("loss")
    assert float(first[1][loss]) - 0.5 > float(second[1][loss])
    assert abs(float(first[-1][loss]) - float(second[1][loss])) < 0.2
    assert [row[0] for row in second[1:]] == ["2", "4"]
    card = (tmp_path / "second" / "final_model" / "README.md").read_text()
    assert "| initial weights | base, SHA-256 " in card
    assert "initial weights" not in (tmp_path / "first" / "final_model" / "README.md").read_text()


def test_a_tokenizer_that_transformers_has_saved_again_is_the_same(tmp_path, exported):
    folder = shutil.copytree(exported, tmp_path / "copy")
    (folder / "SHA256SUMS").unlink()
    before = (folder / "tokenizer.json").read_bytes()
    AutoTokenizer.from_pretrained(folder, padding_side="left", model_max_length=9).save_pretrained(folder)
    content = read_json(folder / "tokenizer.json")
    edit_json(
        folder / "tokenizer.json", padding=None, truncation=None, version="1.0", post_processor=content["decoder"]
    )
    assert (folder / "tokenizer.json").read_bytes() != before
    starting_weights(tmp_path, folder)


def damaged(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (damaged, "damaged or cut off"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"holds no \*\.safetensors"),
        (lambda folder: edit_json(folder / "config.json", model_type="kimi_k2"), "model_type is 'kimi_k2'"),
        (lambda folder: edit_json(folder / "config.json", num_hidden_layers=3), "do not match"),
        (lambda folder: edit_json(folder / "config.json", quantization_config={"a": 1}), "has a quantization_config"),
        (
            lambda folder: edit_json(folder / "config.json", rms_norm_eps=1e-5, routed_scaling_factor=1.0),
            r"rms_norm_eps 1e-05 instead of 1e-06, routed_scaling_factor 1\.0 instead of 2\.5\)",
        ),
        (lambda folder: edit_json(folder / "tokenizer.json", model={"type": "BPE"}), "its tokenizer.json is not that"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json: is no tokenizer"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(tmp_path, exported, change, message):
    folder = shutil.copytree(exported, tmp_path / "copy")
    (folder / "SHA256SUMS").unlink()
    change(folder)
    with pytest.raises(UserError, match=f"^train.init_from is {folder}; .*{message}") as told:
        plan_of(tmp_path, train={"init_from": str(folder)})
    assert "\n" not in str(told.value)


def test_a_missing_weight_is_refused(tmp_path, exported):
    folder = broken(exported, tmp_path / "broken", lambda tensors: without(tensors, "layers.2.eh_proj"))
    with pytest.raises(UserError, match=r"model\.layers\.2\.eh_proj\.weight missing"):
        plan_of(tmp_path, train={"init_from": str(folder)})


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"vocab_size": 300}, "vocab_size 272 instead of 300"),
        ({"kv_lora_rank": 8}, "kv_lora_rank 16 instead of 8"),
        (NO_MTP, "num_nextn_predict_layers 1 instead of 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, "rope_parameters .*10000.* instead of"),
    ],
)
def test_another_architecture_is_refused_with_the_fields_that_differ(tmp_path, exported, architecture, message):
    with pytest.raises(UserError, match=rf"of another architecture than .*config\.json \({message}"):
        plan_of(tmp_path, train={"init_from": str(exported)}, architecture=architecture)


def test_what_changes_no_number_may_differ(tmp_path, exported):
    other = {"max_position_embeddings": 48, "initializer_range": 0.1, "use_cache": False}
    starting_weights(tmp_path, exported, architecture=other)


@pytest.mark.parametrize("name", ["elsewhere/model", "./elsewhere", "a/b/c"])
def test_what_is_neither_a_folder_nor_on_the_hub_is_told_in_one_line(tmp_path, name):
    with pytest.raises(
        UserError, match=f"^train.init_from is {name}; no such folder, and no such model can be"
    ) as told:
        plan_of(tmp_path, train={"init_from": name})
    assert "\n" not in str(told.value)


def test_a_hub_id_stands_for_the_files_that_the_hub_gives(tmp_path, exported, monkeypatch):
    asked = {}

    def download(repo_id: str, **options) -> str:
        asked.update(options, repo_id=repo_id)
        return str(exported)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    plan = plan_of(tmp_path, train={"init_from": "someone/model"})
    assert (asked["repo_id"], plan.initial_weights.folder) == ("someone/model", exported)
    assert "*.py" not in asked["allow_patterns"]


def test_the_weights_are_in_the_fingerprint_and_none_are_where_none_are_named(tmp_path, exported):
    folder = shutil.copytree(exported, tmp_path / "base")
    train = {"init_from": str(folder)}
    first = fingerprint_of(tmp_path, train=train)
    assert fingerprint_of(tmp_path, train=train) == first
    other = broken(exported, tmp_path / "other", lambda tensors: {**tensors, "model.norm.weight": torch.zeros(32)})
    shutil.rmtree(folder)
    other.rename(folder)
    second = fingerprint_of(tmp_path, train=train)
    assert [name for name in first if first[name] != second[name]] == ["initial_weights"]
    assert "initial_weights" not in fingerprint_of(tmp_path)


def test_resuming_takes_the_checkpoint_and_ends_as_an_uninterrupted_training(tmp_path, exported, monkeypatch):
    train = {"init_from": str(exported)}
    trained(tmp_path / "whole", train=train)

    def stopping(run: Run, *arguments) -> None:
        if run.state.step == 6:
            run.interruption.remember(2, None)

    with monkeypatch.context() as patch:
        patch.setattr(hooks, "log_curves", stopping)
        with pytest.raises(Interrupted):
            trained(tmp_path / "rest", train=train, runtime={"resume": "never"})
    steps: list[int] = []
    original = session.train
    monkeypatch.setattr(session, "train", lambda run, *rest: (steps.append(run.state.step), original(run, *rest)))
    trained(tmp_path / "rest", train=train)
    assert steps == [7]
    files = [tmp_path / name / "final_model" / "model.safetensors" for name in ("whole", "rest")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_checkpoint_to_go_on_from_excludes_other_first_weights(tmp_path):
    both = {"init_from": "base", "resume_from_checkpoint": ".checkpoints/a/step_1"}
    with pytest.raises(UserError, match=r"train\.init_from must be null beside resume_from_checkpoint"):
        plan_of(tmp_path, train=both)


def test_two_processes_start_from_the_same_weights_and_the_plan_names_them(tmp_path, exported):
    write_inputs(tmp_path, train={"init_from": str(exported), "max_steps": 2}, runtime={"num_processes": 2})
    done = run_stage(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"weights  those of {exported}, SHA-256 " in done.stdout


def test_the_folder_that_the_training_replaces_is_refused(tmp_path, exported):
    write_inputs(tmp_path, train={"init_from": str(tmp_path / "final_model")})
    shutil.copytree(exported, tmp_path / "final_model")
    done = run_stage(tmp_path)
    assert done.returncode == 2
    assert "final_model; is this training's own output, which DVC removes before it starts" in done.stderr
    assert len(done.stderr.splitlines()) == 1

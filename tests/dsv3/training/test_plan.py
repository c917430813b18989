import json
from pathlib import Path

import pytest
import torch

from dsv3.errors import UserError
from dsv3.sizing.flops import training_flops_per_token
from dsv3.sizing.memory import training_memory
from dsv3.training import precision
from dsv3.training.plan import check_tokens, check_unlinked, introduction, memory_note, read_manifest
from dsv3.training.precision import autocast_dtype, resolved_precision
from tests.damage import DAMAGES
from tests.training_inputs import plan_of


def test_epochs_become_the_nearest_number_of_steps(tmp_path):
    plan = plan_of(tmp_path, train={"max_steps": -1, "num_train_epochs": 1.5})
    blocks = plan.batches.num_blocks_per_epoch
    assert plan.total_steps == round(1.5 * blocks / 4)
    assert plan.epochs_before(plan.total_steps) == pytest.approx(1.5, abs=2 / blocks)
    assert plan.tokens_per_step == 4 * 32


def test_a_stated_number_of_steps_wins_over_epochs(tmp_path):
    plan = plan_of(tmp_path, train={"max_steps": 7, "num_train_epochs": 100.0})
    assert plan.total_steps == 7


def test_a_training_has_at_least_one_step(tmp_path):
    plan = plan_of(tmp_path, train={"max_steps": -1, "num_train_epochs": 0.001, "eval_steps": 1})
    assert plan.total_steps == 1


def test_a_training_that_is_validated_at_its_end_only_says_so(tmp_path):
    late = plan_of(tmp_path, train={"max_steps": 7, "eval_steps": 8})
    assert "train.eval_steps is 8, more than all steps: validated once, at the end" in late.summary()
    assert "note" not in plan_of(tmp_path, train={"max_steps": 7, "eval_steps": 7}).summary()


def test_a_batch_of_many_epochs_is_refused(tmp_path):
    blocks = plan_of(tmp_path).batches.num_blocks_per_epoch
    batch = {"per_device_train_batch_size": blocks, "gradient_accumulation_steps": 1}
    assert plan_of(tmp_path, train=batch).sequences_per_step == blocks
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, train=batch | {"gradient_accumulation_steps": 2})
    assert f"gradient_accumulation_steps is {2 * blocks}; must be <= {blocks}, the sequences of 32" in str(caught.value)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["empty", "foreign", "missing"])
def test_a_damaged_tokenizer_is_not_trained_for(tmp_path, file, damage):
    plan_of(tmp_path)
    assert check_tokens(tmp_path / "tokens").startswith("checked  2 token shards")
    DAMAGES[damage](tmp_path / "tokens" / "tokenizer" / file)
    with pytest.raises(UserError, match=r"tokenizer.*run the tokenize stage again") as told:
        check_tokens(tmp_path / "tokens")
    assert "\n" not in str(told.value)


def test_another_tokenizer_of_the_same_form_is_not_trained_for(tmp_path):
    plan_of(tmp_path)
    path = tmp_path / "tokens" / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"a":', '"#":', 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer.json: is not the tokenizer that was written"):
        check_tokens(tmp_path / "tokens")


def test_an_output_behind_a_link_that_leads_out_of_the_project_is_refused(tmp_path, monkeypatch):
    project, disk = tmp_path / "project", tmp_path / "disk"
    for folder in (project / "outputs", disk):
        folder.mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.chdir(project)
    check_unlinked(Path("outputs/final_model"))
    Path("elsewhere").symlink_to(disk)
    check_unlinked(disk / "final_model")  # by hand, anywhere
    with pytest.raises(UserError, match=r"^elsewhere/final_model: the link .* leads out of the project"):
        check_unlinked(Path("elsewhere/final_model"))


@pytest.mark.parametrize(
    ("asked", "device", "is_native", "resolved", "autocast"),
    [
        ("auto", "cuda", True, "bf16", torch.bfloat16),
        ("auto", "cuda", False, "fp32", torch.float32),
        ("auto", "cpu", True, "fp32", torch.float32),  # a CPU's result depends on no instruction set
        ("fp32", "cuda", True, "fp32", torch.float32),
        ("bf16", "cpu", True, "bf16", torch.bfloat16),
        ("bf16", "cpu", False, "bf16", torch.float32),  # emulated: operands rounded, products in fp32
    ],
)
def test_bf16_is_chosen_where_it_is_native_and_emulated_where_it_is_asked_for(
    monkeypatch, asked, device, is_native, resolved, autocast
):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: is_native)
    assert resolved_precision(asked, torch.device(device)) == resolved
    assert autocast_dtype(asked, torch.device(device)) == autocast


@pytest.mark.parametrize("free", [0, 1 << 50])
def test_the_plan_ends_with_a_note_where_its_device_has_too_little_memory(tmp_path, monkeypatch, free):
    plan = plan_of(tmp_path)
    monkeypatch.setattr("dsv3.training.plan.free_bytes", lambda _: free)
    lines = introduction(plan).splitlines()
    assert lines[: -1 if free == 0 else None] == plan.summary().splitlines()
    assert lines[-1].startswith("note     needs") == (free == 0)


def test_a_training_that_does_not_fit_the_free_memory_says_what_would(tmp_path):
    plan = plan_of(tmp_path, train={"per_device_train_batch_size": 8, "block_size": 64})

    def peak(**changes):
        return training_memory(plan.architecture, plan.params.train.model_copy(update=changes), "cpu").peak_bytes

    whole, smaller, recomputed = peak(), peak(per_device_train_batch_size=5), peak(gradient_checkpointing=True)
    assert peak(per_device_train_batch_size=6) > smaller
    assert memory_note(plan, "cpu", whole, 1) is None
    note = memory_note(plan, "cpu", smaller, 1)
    assert note is not None and "train.per_device_train_batch_size 5" in note
    assert ("train.gradient_checkpointing true" in note) == (recomputed <= smaller)
    assert memory_note(plan, "cpu", whole, 2) is not None  # two processes share a CPU's memory
    assert memory_note(plan, "cuda", whole, 2) is None
    hopeless = memory_note(plan, "cpu", 0, 1)
    assert hopeless is not None and hopeless.endswith(
        "0.00 are free: try train.adam_moments_dtype bf16, or a smaller model"
    )


@pytest.mark.parametrize(("expert_parallel", "sharding", "async_save"), [(1, "none", False), (2, "full", True)])
def test_auto_writes_in_the_background_where_it_comes_to_shards(tmp_path, expert_parallel, sharding, async_save):
    runtime = {"num_processes": 2, "sharding": "auto", "expert_parallel": expert_parallel, "async_save": True}
    chosen = plan_of(tmp_path, runtime=runtime, train={"gradient_accumulation_steps": 2}).params.runtime
    assert (chosen.sharding, chosen.async_save) == (sharding, async_save)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"origin": 5}, "origin"),
        ({"origin": None}, "origin"),
        ({"origin": {"hub_id": 5}}, "origin.hub_id"),
        ({"title": 7}, "title"),
        ({"language": {"a": 1}}, "language"),
        ({"license": 5}, "license"),
        ({"prompt": ["The"]}, "prompt"),
    ],
)
def test_what_the_model_card_takes_from_a_manifest_is_checked_before_the_training(tmp_path, wrong, where):
    described = {"source": "file", "sha256": "0" * 64, "origin": {"path": "text"}, "title": None, "own": {"key": 1}}
    (tmp_path / "manifest.json").write_text(json.dumps(described))
    assert read_manifest(tmp_path) == described
    (tmp_path / "manifest.json").write_text(json.dumps(described | wrong))
    with pytest.raises(UserError, match=rf"manifest\.json: {where}: .*; run the download stage again$"):
        read_manifest(tmp_path)


def test_modules_that_are_not_asked_are_not_counted(tmp_path):
    """Lambda is 0 from 67.6 % of the steps on."""
    train = {"max_steps": 10, "mtp_loss_weight": 0.3, "mtp_loss_weight_final": 0.0}
    plan = plan_of(tmp_path, train=train)
    with_modules = training_flops_per_token(plan.architecture, plan.params.train.block_size)
    without = plan.architecture.model_copy(update={"num_nextn_predict_layers": 0})
    main = training_flops_per_token(without, plan.params.train.block_size)
    tokens = plan.tokens_per_step
    assert plan.flops(range(7)) == pytest.approx(7 * tokens * with_modules)
    assert plan.flops(range(10)) == pytest.approx(tokens * (7 * with_modules + 3 * main))
    assert f"{plan.flops(range(10)):.3g} in all" in plan.summary()

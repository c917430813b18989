from pathlib import Path

import pytest
import torch
from torch import nn

from dsv3.training import checkpoint
from dsv3.training.checkpoint import (
    checkpoints,
    delete_checkpoints,
    load_best,
    load_checkpoint,
    named_tensors,
    prune,
    read_tensors,
    save_best,
    save_checkpoint,
    write_shards,
)
from dsv3.training.optimizer import Optimizer, parameter_groups
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.committed import DEFAULTS
from tests.training_inputs import MICRO

LAYOUT = {"model.safetensors", "optimizer.pt", "scheduler.pt", "config.json", "trainer_state.json", "complete"}


def model_and_optimizer(seed: int = 0) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(directory: Path, step: int, seed: int = 0) -> None:
    save_checkpoint(directory, *model_and_optimizer(seed), {"hidden_size": 3}, {"step": step, "loss": 0.1})


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_checkpoint_holds_the_files_people_look_for_and_gives_everything_back(tmp_path):
    save(tmp_path, 7, seed=1)
    assert names(tmp_path / "step_7") == LAYOUT
    model, optimizer = model_and_optimizer(seed=2)
    assert load_checkpoint(tmp_path / "step_7", model, optimizer) == {"step": 7, "loss": 0.1}
    expected, expected_optimizer = model_and_optimizer(seed=1)
    assert torch.equal(model.weight, expected.weight)
    state, expected_state = optimizer.state[model.weight], expected_optimizer.state[expected.weight]
    assert torch.equal(state["exp_avg"], expected_state["exp_avg"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_shards_without_a_state_or_without_averages_begin_these_anew(tmp_path, optim):
    """As a checkpoint of one process does: an MTP module has no moments while its weight is 0."""
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**MICRO)).train()
    params = DEFAULTS.train.model_copy(update={"optim": optim})
    optimizer = Optimizer(parameter_groups(model, params), params, torch.float32)
    tokens = torch.arange(18).view(2, 9)
    model(tokens[:, :-1], shift_labels=tokens[:, 1:], mtp_loss_weight=0.0).loss.backward()
    optimizer.step()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert any("eh_proj" in name for name in idle)
    write_shards(tmp_path, named_tensors(model, optimizer))

    averaged = params.model_copy(update={"ema_decay": 0.9})
    other = DeepseekV3ForCausalLM(DeepseekV3Config(**MICRO)).train()
    loaded = Optimizer(parameter_groups(other, averaged), averaged, torch.float32)
    read_tensors(tmp_path, other, loaded)
    theirs = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, theirs[name])
        state, expected = loaded.state[parameter], optimizer.state.get(theirs[name], {})
        assert set(state) == set(expected) and (not state) == (name in idle), name
        assert all(torch.equal(state[part], expected[part]) for part in state)
    another = DEFAULTS.train.model_copy(update={"optim": {"adamw": "muon", "muon": "adamw"}[optim]})
    with pytest.raises((RuntimeError, KeyError, ValueError)):
        read_tensors(tmp_path, other, Optimizer(parameter_groups(other, another), another, torch.float32))


def test_what_was_loaded_does_not_change_with_its_file(tmp_path):
    save(tmp_path, 7, seed=1)
    model, optimizer = model_and_optimizer(seed=2)
    load_checkpoint(tmp_path / "step_7", model, optimizer)
    for file in (tmp_path / "step_7").iterdir():  # in place: a mapped file would show through
        size = file.stat().st_size
        with file.open("r+b") as handle:
            handle.write(b"\xff" * size)
    expected, expected_optimizer = model_and_optimizer(seed=1)
    assert torch.equal(model.weight, expected.weight)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], expected_optimizer.state[expected.weight]["exp_avg"])


def test_the_newest_complete_checkpoint_comes_last_and_a_half_written_one_not_at_all(tmp_path):
    for step in (9, 10, 2):
        save(tmp_path, step)
    (tmp_path / "step_11").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_2", "step_9", "step_10"]


def test_a_crash_while_writing_leaves_the_older_checkpoint_and_nothing_that_looks_complete(tmp_path, monkeypatch):
    save(tmp_path, 5)

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_model", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 6)
    assert names(tmp_path) == {"step_5"}


def test_pruning_keeps_the_newest_and_the_best_and_removes_what_was_left_half_written(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
        save_best(tmp_path, nn.Linear(1, 1), step)
    (tmp_path / ".step_4.123.tmp").mkdir()
    save_best(tmp_path, nn.Linear(1, 1), 5)  # while step 3 was written beside the steps that followed
    prune(tmp_path, save_total_limit=2, best_step=1)
    assert names(tmp_path) == {"step_2", "step_3", "best_1", "best_5"}


def test_the_best_weights_come_back(tmp_path):
    best, model = nn.Linear(2, 2), nn.Linear(2, 2)
    save_best(tmp_path, best, 3)
    load_best(tmp_path, model, 3)
    assert torch.equal(model.weight, best.weight)


def test_deleting_removes_all_that_was_saved_and_leaves_the_facts(tmp_path):
    save(tmp_path, 1)
    save_best(tmp_path, nn.Linear(1, 1), 1)
    (tmp_path / ".step_4.123.tmp").mkdir()
    (tmp_path / "facts.json").write_text("{}")
    delete_checkpoints(tmp_path)
    assert names(tmp_path) == {"facts.json"}

import pytest
import torch

from dsv3.training import precision
from dsv3.training.precision import autocast_dtype, resolved_precision
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
    plan = plan_of(tmp_path, train={"max_steps": -1, "num_train_epochs": 0.001})
    assert plan.total_steps == 1


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

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dsv3.training.attention import attention_kernel
from dsv3.training.setup import prepare_model
from tests.training_inputs import plan_of

CPU = torch.device("cpu")
OPERATORS = {
    "flash": "aten::_scaled_dot_product_flash_attention_for_cpu",
    "math": "aten::_scaled_dot_product_attention_math",
    "dsv3_cpu": "dsv3::causal_attention_cpu",
}


def operators_of_a_forward_pass(plan) -> set[str]:
    """Return the names of torch's operators that the model of a training calls."""
    model, _ = prepare_model(plan, CPU)
    tokens = torch.zeros(1, plan.params.train.block_size, dtype=torch.int64)
    positions = None if plan.params.train.cross_document_attention else torch.arange(tokens.shape[1])[None] % 8
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model.train()(input_ids=tokens, shift_labels=tokens, position_ids=positions)
    return {event.key for event in found.key_averages()}


@pytest.mark.parametrize(
    ("value_width", "change", "kernel"),
    [
        (8, {}, "dsv3_cpu"),
        (8, {"cross_document_attention": False}, "math"),
        (16, {}, "flash"),
        (16, {"cross_document_attention": False}, "flash"),
    ],
    ids=str,
)
def test_the_kernel_that_is_recorded_is_the_one_that_attends(tmp_path, value_width, change, kernel):
    """Latent attention's values are narrower than its queries, which torch's fast kernel on a CPU does not take."""
    plan = plan_of(tmp_path, architecture={"v_head_dim": value_width}, train=change)
    assert attention_kernel(plan.architecture, plan.params.train, CPU) == kernel
    called = operators_of_a_forward_pass(plan)
    assert {name for name, operator in OPERATORS.items() if operator in called} == {kernel}


def test_it_stands_in_the_line_on_what_runs_and_in_the_metrics(tmp_path):
    _, chosen = prepare_model(plan_of(tmp_path), CPU)
    assert "attention by dsv3_cpu" in chosen.summary()
    assert chosen.metrics()["attention"] == "dsv3_cpu"

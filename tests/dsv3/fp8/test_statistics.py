import pytest
import torch
from torch import nn

from dsv3.fp8.quantize import rounded_rows, rounded_weight
from dsv3.fp8.recipe import Recipe
from dsv3.fp8.statistics import Statistics, fp8_statistics, row_statistics, weight_statistics
from dsv3.kernels.convert import convert
from dsv3.kernels.registry import register_experts
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.training_inputs import MICRO, WIDE

CPU = torch.device("cpu")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_relative_error_is_that_of_the_quantizers():
    x = normal(64, 256)
    assert row_statistics(x).relative_error == pytest.approx(((rounded_rows(x) - x).norm() / x.norm()).item())
    stack = normal(2, 256, 128)
    error = (rounded_weight(stack) - stack).norm() / stack.norm()
    assert weight_statistics(stack).relative_error == pytest.approx(error.item())


def test_normal_numbers_hardly_underflow_and_reach_the_end_of_the_range_once_per_block():
    statistics = row_statistics(normal(512, 128))
    assert statistics.underflow_share < 0.005
    assert 1 / 128 <= statistics.saturation_share < 2 / 128
    assert statistics.outlier_block_share == 0


def test_one_huge_number_makes_the_rest_of_its_block_underflow():
    x = normal(2, 128)
    x[0, 5] = 1e8
    statistics = row_statistics(x)
    assert statistics.underflow_share == pytest.approx(127 / 256, abs=0.01)
    assert statistics.outlier_block_share == 0.5


def test_padding_is_not_counted():
    assert row_statistics(normal(16, 64)).saturation_share >= 1 / 64
    assert row_statistics(torch.zeros(4, 128)).underflow_share == 0


def test_every_low_precision_layer_is_watched_and_no_gradient_is_touched():
    model = nn.Sequential(nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 128), nn.Linear(128, 4))
    convert(model, Recipe(), torch.device("cpu"))
    found = fp8_statistics(model, lambda: model(normal(32, 128)).square().mean())
    assert list(found) == ["0", "2"]  # the last one is smaller than a block
    for statistics in found.values():
        assert set(statistics) == {"input", "weight", "gradient"}
        assert statistics["weight"].shares()["nonzero_grad_share"] > 0.99
        assert all(0.01 < operand.relative_error < 0.05 for operand in statistics.values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_power_of_two_scales_are_coarser():
    x = normal(64, 128)
    fine, coarse = row_statistics(x), row_statistics(x, power_of_two_scales=True)
    assert coarse.relative_error == pytest.approx(
        ((rounded_rows(x, power_of_two_scales=True) - x).norm() / x.norm()).item()
    )
    assert coarse.saturation_share < fine.saturation_share


def test_a_recipe_of_mx_blocks_is_looked_at_in_its_own_blocks():
    model = nn.Linear(128, 256, bias=False)
    convert(holder := nn.Sequential(model), Recipe(mx_blocks=True), torch.device("cpu"))
    x, seen = normal(32, 128), Recipe(mx_blocks=True)
    found = fp8_statistics(holder, lambda: holder(x).square().mean(), seen)["0"]
    for operand, tensor in (("input", x), ("weight", model.weight.detach())):
        error = (rounded_rows(tensor, **seen.blocks) - tensor).norm() / tensor.norm()
        assert found[operand].relative_error == pytest.approx(error.item(), rel=1e-5), operand
        assert found[operand].num_blocks == tensor.numel() // 32


def test_statistics_of_parts_add_up_to_those_of_the_whole(monkeypatch):
    x = normal(64, 256) * torch.logspace(-6, 6, 64)[:, None]
    whole = row_statistics(x)
    parts = row_statistics(x[:40]) + row_statistics(x[40:])
    monkeypatch.setattr("dsv3.fp8.statistics.CHUNK_NUMBERS", 1000)
    for same in (parts, row_statistics(x)):
        assert same.shares() == pytest.approx(whole.shares(), rel=1e-6)  # sums of squares in fp32, in other groups


def test_what_was_not_measured_is_left_out():
    assert Statistics().shares() == row_statistics(torch.zeros(4, 128)).shares() == {}
    assert Statistics(num_gradients=4, num_nonzero_gradients=1).shares() == {"nonzero_grad_share": 0.25}


@pytest.mark.parametrize(
    ("recipe", "operands"),
    [
        (Recipe(weight_quant=False), {"input", "gradient", "weight"}),  # the weight for its gradient's zeros alone
        (Recipe(activation_quant=False), {"weight"}),
    ],
)
def test_only_what_the_recipe_quantizes_has_an_error(recipe, operands):
    model = nn.Sequential(nn.Linear(128, 128))
    convert(model, recipe, CPU)
    (found,) = fp8_statistics(model, lambda: model(normal(32, 128)).square().mean(), recipe).values()
    assert set(found) == operands
    assert ("relative_error" in found["weight"].shares()) == recipe.weight_quant


def test_gradients_that_are_lost_are_seen():
    model = nn.Sequential(nn.Linear(128, 256))
    convert(model, Recipe(), CPU)
    (found,) = fp8_statistics(model, lambda: model(normal(32, 128))[:, :64].square().mean()).values()
    assert found["weight"].shares()["nonzero_grad_share"] == pytest.approx(0.25, abs=1e-3)


def test_the_routed_experts_are_watched_and_one_without_tokens_does_not_count_as_lost():
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**MICRO, **WIDE})).train()
    model.set_experts_implementation(register_experts("auto", CPU, torch.float32, use_fp8=True))
    convert(model, Recipe(), CPU)
    ((_, router), *_) = model.routers()
    router.e_score_correction_bias[3] = -1.0
    tokens = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(0))
    found = fp8_statistics(model, lambda: model(tokens, labels=tokens).loss)
    experts = found["model.layers.1.mlp.experts"]
    assert router.expert_load[3] == 0
    assert set(experts) == {"input", "gradient", "gate_up", "down"}
    assert all(0.01 < operand.relative_error < 0.05 for operand in experts.values())
    num_used = (router.expert_load > 0).sum()
    for operand, numbers in {"gate_up": 2 * 128 * 128, "down": 128 * 128}.items():
        assert experts[operand].num_gradients == num_used * numbers
        assert experts[operand].shares()["nonzero_grad_share"] > 0.99
    assert "model.layers.2.eh_proj" not in found  # the prediction module did not run

import pytest
import torch
from torch import nn

from dsv3.fp8.convert import convert
from dsv3.fp8.quantize import rounded_rows, rounded_weight
from dsv3.fp8.recipe import Recipe
from dsv3.fp8.statistics import fp8_statistics, row_statistics, weight_statistics


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_relative_error_is_that_of_the_quantisers():
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
        assert all(0.01 < operand.relative_error < 0.05 for operand in statistics.values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())

import pytest
import torch
from torch import nn

from benchmarks.fp8_errors import (
    CHOICES,
    SQUARE,
    TENSOR,
    TILE,
    Choice,
    accumulated,
    cut,
    errors,
    product_error,
    rounded,
)
from benchmarks.fp8_operands import Layer, normal_layer, watched
from dsv3.fp8.quantize import rounded_columns, rounded_rows, rounded_weight
from dsv3.fp8.recipe import DEEPSEEK_RECIPE
from dsv3.kernels.convert import convert


def normal(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    x[:, ::37] *= 1e3
    return x


@pytest.mark.parametrize("power_of_two_scales", [False, True])
@pytest.mark.parametrize("shape", [(130, 256), (5, 200), (257, 160)])
def test_the_projects_choice_is_what_its_layers_compute_bit_for_bit(shape, power_of_two_scales):
    x = normal(*shape)
    tile, square = (Choice(block, power_of_two_scales=power_of_two_scales) for block in (TILE, SQUARE))
    assert torch.equal(rounded(x, tile), rounded_rows(x, power_of_two_scales))
    assert torch.equal(rounded(x.t(), tile).t(), rounded_columns(x, power_of_two_scales))
    assert torch.equal(rounded(x, square), rounded_weight(x, power_of_two_scales))


def test_e5m2_has_a_mantissa_bit_less_and_one_scale_for_all_is_one_scale():
    x = normal(64, 256)
    coarse = rounded(x, Choice(dtype=torch.float8_e5m2))
    assert ((coarse - x).abs() <= x.abs() / 8 * (1 + 1e-6)).all()  # 2 mantissa bits
    assert ((coarse - x).abs() > x.abs() / 15).any()
    alone = rounded(x, Choice(TENSOR))
    scale = x.abs().max() / 448
    assert torch.allclose(alone / scale, (x / scale).to(torch.float8_e4m3fn).float(), rtol=1e-6, atol=0)


def test_the_error_does_not_depend_on_the_size_of_a_channel():
    x, w = torch.randn(32, 64), torch.randn(64, 16)
    noisy = x + 0.01 * torch.randn(32, 64)
    scale_R, scale_N = torch.rand(32, 1) + 0.5, torch.rand(1, 16) + 0.5
    plain = product_error((noisy, w), (x, w))
    assert product_error((noisy * scale_R, w * scale_N), (x * scale_R, w * scale_N)) == pytest.approx(plain, rel=1e-5)


def test_bf16_errs_least_and_e5m2_most_on_normal_numbers():
    whole = normal_layer(1.0)
    layer = Layer(whole.x_RI[:64, :256], whole.grad_RO[:64, :128], whole.weight_OI[:128, :256])
    found = {name: errors(layer, choice)["forward"] for name, choice in CHOICES.items()}
    assert min(found, key=lambda name: found[name]) == "bf16, no scales"
    assert max(found, key=lambda name: found[name]) == "1×128, e5m2"


def test_cutting_keeps_the_leading_bits_and_moves_towards_zero():
    x = torch.tensor([1 + 2**-13, 1 + 2**-14, -1 - 2**-14, 3.0, 0.0])
    assert cut(x, 14).tolist() == [1 + 2**-13, 1.0, -1.0, 3.0, 0.0]
    assert torch.equal(cut(x, 24), x)


def test_promotion_takes_back_most_of_what_fourteen_bits_lose():
    a, b = torch.randn(16, 1024).abs(), torch.randn(1024, 16).abs()
    truth = a.double() @ b.double()
    lost = {every: (accumulated(a, b, 14, every).double() - truth).norm() for every in (128, 1024)}
    assert (accumulated(a, b, 24, 1024).double() - truth).norm() / truth.norm() < 1e-6  # fp32
    assert 4 * lost[128] < lost[1024]


def test_the_operands_of_every_fp8_layer_are_captured():
    model = nn.Sequential(nn.Linear(128, 256, bias=False), nn.SiLU(), nn.Linear(256, 128, bias=False))
    convert(model, DEEPSEEK_RECIPE, torch.device("cpu"))
    x = torch.randn(2, 3, 128)
    layers = watched(model, lambda: model(x).sum())
    assert list(layers) == ["0", "2"]
    assert torch.equal(layers["0"].x_RI, x.view(6, 128))
    assert torch.equal(layers["2"].grad_RO, torch.ones(6, 128))
    assert layers["0"].grad_RO.shape == (6, 256)

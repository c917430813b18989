import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.fp8 import definition, quantize
from dsv3.fp8.definition import AMAX_FLOOR, BLOCK, MX_BLOCK

ALL_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
FP32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
HOSTILE = st.one_of(
    FP32, st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 2.0**-100, 2.0**-101, 1e4, -1e4, 3.4e38, 448.0, 464.0, 1.0])
)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Equal numbers; NaN equals NaN, and zero equals minus zero."""
    return torch.equal(x.nan_to_num(nan=12345.0), y.nan_to_num(nan=12345.0)) and x.shape == y.shape


def matrix(num_rows: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    """Return normal numbers with columns 1e4 times larger, rows 1e-30 times smaller, and a block of zeros."""
    x = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed))
    x[:, ::37] *= 1e4
    x[3::29] *= 1e-30
    x[:1, :BLOCK] = 0
    return x


def test_the_definition_knows_the_numbers_of_torchs_e4m3():
    for value in ALL_E4M3.float().tolist():
        assert math.isnan(value) or definition.e4m3(value) == value
    assert definition.e4m3(464.0) == 448.0
    assert math.isnan(definition.e4m3(math.nan))


@given(st.floats(min_value=-463, max_value=463, width=32))
def test_the_definition_rounds_as_torch_casts(value):
    assert definition.e4m3(value) == torch.tensor(value).to(torch.float8_e4m3fn).float().item()


def test_rounding_without_leaving_fp32_is_the_cast_for_every_tie_and_both_its_neighbours():
    finite = ALL_E4M3.float()[ALL_E4M3.float().isfinite()].sort().values
    ties = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    y = torch.cat([finite, ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
    assert torch.equal(quantize.round_to_e4m3_(y.clone(), torch.empty_like(y)), y.to(torch.float8_e4m3fn).float())


@settings(max_examples=60)
@given(st.lists(HOSTILE, min_size=1, max_size=9), st.booleans(), st.sampled_from([BLOCK, MX_BLOCK]))
def test_a_block_of_hostile_numbers_is_stored_as_the_definition_says(values, power_of_two_scales, length):
    block = torch.tensor(values + [values[0]] * (length - len(values)), dtype=torch.float32)
    stored, scale = definition.quantized_block(block.tolist(), power_of_two_scales)
    quantized = quantize.quantized_rows(block[None], power_of_two_scales, length)
    assert quantized.scales.item() == scale
    assert quantized.values.float().tolist() == [stored]
    meant = [definition.fp32(value * scale) for value in stored]
    assert quantize.rounded_rows(block[None], power_of_two_scales, length).tolist() == [meant]


@pytest.mark.parametrize("power_of_two_scales", [False, True])
def test_scale_and_inverse_are_each_rounded_once(power_of_two_scales):
    amax = torch.randn(2000, generator=torch.Generator().manual_seed(0)).exp()
    scales, inverses = quantize.scale_and_inverse(amax, power_of_two_scales)
    truth = [definition.scale_and_inverse(value, power_of_two_scales) for value in amax.tolist()]
    assert list(zip(scales.tolist(), inverses.tolist(), strict=True)) == truth


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("power_of_two_scales", [False, True])
def test_a_nan_or_an_infinity_makes_its_whole_block_nan_and_no_other(poison, power_of_two_scales):
    x = matrix(4, 2 * BLOCK)
    x[1, 5] = poison
    for rounded in (
        quantize.rounded_rows(x, power_of_two_scales),
        quantize.dequantized(quantize.quantized_rows(x, power_of_two_scales), (1, BLOCK)),
    ):
        assert rounded[1, :BLOCK].isnan().all()
        assert rounded.isnan().sum() == BLOCK
    stored, scale = definition.quantized_block(x[1, :BLOCK].tolist(), power_of_two_scales)
    assert all(math.isnan(value * scale) for value in stored)


@pytest.mark.parametrize("power_of_two_scales", [False, True])
@pytest.mark.parametrize("shape", [(1, BLOCK), (130, 2 * BLOCK), (257, 96), (5, 200), (0, BLOCK)])
def test_the_fp32_shortcut_means_what_the_stored_form_means(shape, power_of_two_scales):
    x = matrix(*shape) if shape[0] else torch.empty(shape)
    rows = quantize.quantized_rows(x, power_of_two_scales)
    assert same(quantize.rounded_rows(x, power_of_two_scales), quantize.dequantized(rows, (1, BLOCK))[:, : shape[1]])
    if shape[0]:
        columns = quantize.quantized_columns(x, power_of_two_scales)
        assert same(
            quantize.rounded_columns(x, power_of_two_scales),
            quantize.dequantized(columns, (1, BLOCK))[:, : shape[0]].t(),
        )
        weight = quantize.dequantized(quantize.quantized_weight(x, power_of_two_scales), (BLOCK, BLOCK))
        assert same(quantize.rounded_weight(x, power_of_two_scales), weight[: shape[0], : shape[1]])


@pytest.mark.parametrize("shape", [(1, 32), (70, 96), (33, 50)])
def test_blocks_of_32_mean_the_same_along_rows_columns_and_outputs(shape):
    x = matrix(*shape)
    rows = quantize.dequantized(quantize.quantized_rows(x, True, MX_BLOCK), (1, MX_BLOCK))[:, : shape[1]]
    columns = quantize.dequantized(quantize.quantized_rows(x.t().contiguous(), True, MX_BLOCK), (1, MX_BLOCK)).t()
    assert same(quantize.rounded_rows(x, True, MX_BLOCK), rows)
    assert same(quantize.rounded_columns(x, True, MX_BLOCK), columns[: shape[0]])
    assert same(quantize.rounded_along_outputs(torch.stack([x, x]), True, MX_BLOCK)[1], columns[: shape[0]])


def test_a_stack_of_weights_is_rounded_matrix_by_matrix():
    stack = torch.stack([matrix(200, 256, seed) for seed in range(3)])
    assert torch.equal(quantize.rounded_weight(stack), torch.stack([quantize.rounded_weight(w) for w in stack]))


def test_padding_with_zeros_changes_nothing():
    x = matrix(100, 200)
    padded = torch.nn.functional.pad(x, (0, 56, 0, 28))
    for rounded in (quantize.rounded_rows, quantize.rounded_columns, quantize.rounded_weight):
        assert torch.equal(rounded(padded)[:100, :200], rounded(x))


@given(st.integers(min_value=0, max_value=2**31 - 1), st.booleans())
def test_rounding_errs_by_at_most_a_sixteenth_of_the_number_or_the_smallest_spacing_of_the_block(
    seed, power_of_two_scales
):
    x = torch.randn(8, BLOCK, generator=torch.Generator().manual_seed(seed)).exp() ** 3
    scale = quantize.quantized_rows(x, power_of_two_scales).scales
    error = (quantize.rounded_rows(x, power_of_two_scales) - x).abs()
    bound = torch.maximum(x.abs() / 16, scale * 2**-10) * (1 + 1e-6)
    assert (error <= bound).all()


def test_rounding_twice_is_rounding_once():
    x = matrix(64, 2 * BLOCK)
    once = quantize.rounded_rows(x, power_of_two_scales=True)
    assert torch.equal(quantize.rounded_rows(once, power_of_two_scales=True), once)


@given(st.floats(min_value=0, max_value=2.0**127, width=32))
def test_power_of_two_scales_are_powers_of_two_at_most_twice_the_fp32_scale(amax):
    exact, _ = quantize.scale_and_inverse(torch.tensor([amax]))
    scale, inverse = quantize.scale_and_inverse(torch.tensor([amax]), power_of_two_scales=True)
    assert math.frexp(scale.item())[0] == 0.5
    assert exact <= scale < 2 * exact
    assert scale * inverse == 1


def test_a_block_below_the_floor_keeps_the_floors_scale():
    x = torch.full((1, BLOCK), AMAX_FLOOR / 16)
    assert quantize.quantized_rows(x).scales.item() == np.float32(AMAX_FLOOR / 448)
    assert torch.equal(
        quantize.rounded_rows(x), quantize.quantized_rows(x).values.float() * np.float32(AMAX_FLOOR / 448)
    )

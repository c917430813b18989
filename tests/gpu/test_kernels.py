"""The FP8 kernels on a device: the emulation's bits where rounding is all, and a reasoned distance elsewhere."""

from functools import partial

import pytest
import torch

from dsv3.fp8 import quantize
from dsv3.fp8.recipe import DEEPSEEK_RECIPE, Recipe
from dsv3.kernels import dense_gemm, grouped_mm, reference
from tests.dsv3.kernels.cases import ROUTINGS, case, errors, results
from tests.gpu.conftest import poison

# Libraries warn of devices and drivers that this project can't foresee.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

TENSOR_CORES = 2e-3
"""Relative error of a product of the same quantized operands, by its norm.

FP8 tensor cores align 32 products and the running sum to the largest of them and cut off what lies more than 13 bits
below; after 128 products the sum goes to fp32. A model of that in float64 errs by 1.2e-4 for normal operands at every
inner length, and by 5e-4 where one feature is 1000 times larger and everything is aligned to it. The tolerance allows
one bit less and twice that. A wrong scale errs by 1e-2 or more, another rounding of one operand by 3e-2.
"""
BF16_RESULT = 4e-3
"""Relative difference of a product in bf16 from one in fp32: a rounding of 2^-9, and what the tensor cores cut off."""
FLIPS = 2e-2
"""Relative difference between device and emulation after a second quantization: sums that differ by 1e-4 round to the
next e4m3 number, 9 % away, in one of about a thousand cases, which makes 3e-3 per quantization. FP8 itself errs by
3e-2 per product."""
BF16 = 3e-2
"""Relative error of experts in bf16. About eight roundings in a row err by 6e-3 together; the routing weights of a
single token are two sums whose terms cancel, for which a CPU gives 2.2e-2. A row of another token would err by 1."""


def test_the_quantizers_give_the_emulations_bits_for_hostile_numbers(checks, fp8_device):
    differences = checks.quantizer_differences(fp8_device)
    assert len(differences) == 14
    assert set(differences.values()) == {0}, differences


def test_hypothesis_finds_no_block_that_device_emulation_and_definition_store_differently(checks, fp8_device, is_small):
    assert checks.check_hostile_blocks(fp8_device, max_examples=5 if is_small else 500) >= 5


def test_the_quantizers_agree_for_many_experts_with_every_number_of_rows(checks, fp8_device, is_small):
    rows = (130, 0, 3) if is_small else (*range(0, 260, 4), 1000, 0, 0, 1)
    groups = checks.Groups(rows, num_tokens=500, num_inputs=256 if is_small else 1408, num_outputs=128)
    x = checks.hostile(groups.num_tokens, groups.num_inputs)
    for power_of_two_scales in (False, True):
        assert checks.column_differences(x, groups, power_of_two_scales, fp8_device) == 0
        assert sum(map(checks.differing, *quantized_rows(checks, x, power_of_two_scales, fp8_device))) == 0


def quantized_rows(checks, x, power_of_two_scales, device):
    return checks.triton_launch.quantize_rows(x.to(device), power_of_two_scales), quantize.quantized_rows(
        x, power_of_two_scales
    )


@pytest.mark.parametrize("name", ["rounded_rows", "rounded_columns", "rounded_weight"])
@pytest.mark.parametrize("power_of_two_scales", [False, True])
def test_the_emulation_itself_gives_the_same_bits_on_a_device_as_on_a_cpu(
    checks, fp8_device, name, power_of_two_scales
):
    x, rounded = checks.hostile(300, 256), getattr(quantize, name)
    assert checks.differing(rounded(x.to(fp8_device), power_of_two_scales), rounded(x, power_of_two_scales)) == 0


@pytest.mark.parametrize("outlier", [1.0, 1e3])
@pytest.mark.parametrize("loads", ["even", "ragged", "one expert"])
def test_all_three_grouped_gemms_agree_with_float64_products_of_the_same_quantized_operands(
    checks, fp8_device, is_small, loads, outlier
):
    rows = {
        "even": (512,) * 8,
        "ragged": (130, 0, 1, 27, 1000, 128, 129, 0, 5, 640),
        "one expert": (0, 0, 3000, 0),
    }[loads]
    groups = checks.SMALL if is_small else checks.Groups(rows, num_tokens=900, num_inputs=2048, num_outputs=768)
    found = checks.gemm_errors(groups, fp8_device, outlier)
    assert found.pop("wgrad of empty experts") == 0
    assert max(found.values()) < TENSOR_CORES, found


def test_a_long_inner_dimension_errs_no_more_than_a_short_one(checks, fp8_device, is_small):
    """Sums of 16384 products that stayed in the tensor cores would err ten times more than those of 256."""
    lengths = (128, 256) if is_small else (256, 16384)
    groups = [checks.Groups((64,), 64, num_inputs=length, num_outputs=128) for length in lengths]
    short, long = (checks.gemm_errors(group, fp8_device, outlier=1.0)["forward"] for group in groups)
    assert long < 2 * short + 1e-6


def test_cublas_is_trusted_on_hopper_and_gives_what_our_kernels_give(checks, fp8_device):
    if fp8_device.type != "cuda" or torch.cuda.get_device_capability(fp8_device) != (9, 0):
        pytest.skip("cuBLAS multiplies 128 x 128 blocks on Hopper alone")
    assert dense_gemm.cublas_agrees(fp8_device)
    for num_inputs in (128, 640, 4096):
        found = checks.dense_errors(fp8_device, num_inputs)
        assert max(found.values()) < BF16_RESULT, (num_inputs, found)


@pytest.mark.parametrize("shape", [(130, 160, 200), (1, 128, 128), (4096, 2048, 576)])
def test_a_linear_layer_agrees_with_the_emulation_in_all_three_products(checks, fp8_device, is_small, shape):
    if is_small and shape[0] > 1000:
        pytest.skip("too large for the interpreter")
    found = checks.linear_errors(shape, DEEPSEEK_RECIPE, fp8_device)
    assert max(found.values()) < TENSOR_CORES, found


@pytest.mark.parametrize(
    "recipe", [DEEPSEEK_RECIPE, Recipe(power_of_two_scales=True)], ids=["fp32", "power_of_two_scales"]
)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_fp8_experts_agree_with_the_emulation_in_their_output_and_every_gradient(checks, fp8_device, routing, recipe):
    inputs = case(routing, hidden_size=256, intermediate_size=128, num_experts=4)
    found = checks.expert_errors(inputs, recipe, fp8_device)
    assert max(found.values()) < FLIPS, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ["random", "empty experts", "one expert", "ragged"])
def test_fp8_experts_err_by_their_formats_precision(checks, fp8_device, routing, dtype):
    """A rounded operand errs by 2.6e-2; six of them in a row, as the routing weight's gradient sees them, by 6.4e-2."""
    inputs = case(routing, hidden_size=256, intermediate_size=128)
    truth = results(reference.experts, inputs.to(torch.float64))
    rows = inputs.to(dtype)
    rows.gate_up, rows.down = inputs.gate_up, inputs.down  # the master weights stay in fp32
    fp8 = partial(checks.triton_experts.experts, recipe=DEEPSEEK_RECIPE)
    found = errors({name: value.cpu() for name, value in results(fp8, rows.on(fp8_device)).items()}, truth)
    assert all(1e-2 < error < 0.12 for error in found.values()), found


@pytest.mark.parametrize("routing", [routing for routing in ROUTINGS if routing != "no tokens"])
@pytest.mark.parametrize("backend", [grouped_mm, reference], ids=["grouped_mm", "reference"])
def test_bf16_experts_agree_with_the_reference_in_fp64(device, backend, routing):
    inputs = case(routing, hidden_size=256, intermediate_size=128)
    truth = results(reference.experts, inputs.to(torch.float64))
    inputs = inputs.to(torch.bfloat16).on(device)
    poison(device)
    found = results(backend.experts, inputs)
    found = errors({name: value.cpu() for name, value in found.items()}, truth)
    assert max(found.values()) < BF16, found


def test_two_runs_of_fp8_experts_give_equal_bits(checks, fp8_device):
    inputs = case("ragged", hidden_size=256, intermediate_size=128).on(fp8_device)
    fp8 = partial(checks.triton_experts.experts, recipe=DEEPSEEK_RECIPE)
    first, second = (results(fp8, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)

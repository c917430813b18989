"""The Triton kernels without a GPU, first way: what they compute, in Triton's interpreter, against the emulation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is installed with CUDA builds of torch, and by the dev extra")

TOLERANCE = 1e-6
"""fp32 sums of at most 256 products, in another order; an operand rounded differently would show as 1e-4 or more."""
BF16_ROUNDING = 2**-8
"""A result in bf16 against one in fp32."""
BF16_WGRAD_TOLERANCE = 2**-8
"""Both operands and the sum are rounded to bf16, by 2^-9 of a number at most each, and mostly not the same way."""
ROUTINGS = [
    "ragged",
    "empty experts",
    "one token",
    "no tokens",
    "two tiles, fp32 scales",
    "two tiles, power-of-two scales",
]


@pytest.fixture(scope="module")
def found() -> dict:
    """What tests/dsv3/kernels/interpreted.py found, in a process in which Triton interprets."""
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{here}"}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", str(here / "interpreted.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_quantizers_give_torchs_bits_for_hostile_numbers(found):
    """Zeros, denormals, outliers, NaN and infinities; fp32 and bf16; both kinds of scales; gathered, ragged columns."""
    assert len(found["quantizers"]) == 14
    assert set(found["quantizers"].values()) == {0}, found["quantizers"]


def test_hypothesis_finds_no_block_that_kernels_emulation_and_definition_store_differently(found):
    """Rows, columns and weights, of numbers drawn from the same hostile ones, with both kinds of scales."""
    assert found["hostile blocks"] >= 40


def test_all_three_gemms_agree_with_float64_products_of_the_same_quantized_operands(found):
    for sizes in ("gemms", "many tiles"):
        assert max(found[sizes].values()) < TOLERANCE, found[sizes]


def test_the_weight_gradient_of_an_expert_without_tokens_is_exactly_zero(found):
    assert found["gemms"]["wgrad of empty experts"] == 0


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_experts_agree_with_the_emulation_in_their_output_and_every_gradient(found, routing):
    assert max(found["experts"][routing].values()) < TOLERANCE, found["experts"][routing]


def test_what_is_kept_in_fp8_and_the_gradients_from_it_are_what_torchs_quantizer_gives(found):
    """Compared on the kernels' own gate and up: the emulation's differ in the last bit, which can round another way."""
    assert set(found["cache"].values()) == {0}, found["cache"]
    assert len(found["cache"]) == 6


def test_a_linear_layer_of_odd_dimensions_agrees_with_the_emulation(found):
    assert max(found["linear"].values()) < TOLERANCE, found["linear"]


@pytest.mark.parametrize(("kind", "weights"), [("experts", {"gate_up", "down"}), ("linear", {"weight"})])
def test_a_weight_gradient_that_is_not_quantized_takes_bf16_operands(found, kind, weights):
    """The emulation leaves its operands unrounded; outputs and the other gradients stay FP8 and agree as before."""
    errors = found["bf16 wgrad"][kind]
    for name, error in errors.items():
        low, high = (TOLERANCE, BF16_WGRAD_TOLERANCE) if name in weights else (0, TOLERANCE)
        assert low <= error < high, (name, error)


def test_the_operators_pass_opcheck(found):
    """Shapes and dtypes that they promise to torch.compile are those that the kernels give, forward and backward."""
    assert found["operators"] == ["weight", "experts", "experts, SwiGLU in FP8", "linear"]


def test_torchs_dense_products_take_our_operands_as_it_documents_them(found):
    """Five blocks of inputs, so that the weight's scales are padded to eight."""
    assert set(found["dense"]["errors"]) == {"forward", "dgrad", "wgrad"}
    assert max(found["dense"]["errors"].values()) < BF16_ROUNDING, found["dense"]


def test_torchs_dense_products_are_trusted_only_where_they_give_what_ours_give(found):
    trusted = {name for name, agrees in found["dense"].items() if agrees is True}
    distrusted = {name for name, agrees in found["dense"].items() if agrees is False}
    assert trusted == {"as documented"}
    assert len(distrusted) == 7, "six ways to misread the scales, and a device that is refused"


def test_every_mutation_of_the_kernels_is_noticed(found):
    """The checks above can fail: each of these one-line mistakes moves one of them far past its tolerance."""
    assert len(found["mutations"]) == 15
    missed = {name: effect for name, effect in found["mutations"].items() if effect < 100 * TOLERANCE}
    assert not missed

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv3.fp8.recipe import Recipe
from dsv3.fp8.rounding import BF16, EXACT, ROUNDINGS, fp8_rounding
from dsv3.kernels import cpu, grouped_mm, reference
from dsv3.kernels.emulated_linear import weight_operands
from dsv3.kernels.registry import register_experts
from tests.dsv3.kernels.cases import ROUTINGS, case, errors, results

FP32_TOLERANCE = 2e-6
"""Sums of at most 37 * 24 products in fp32, in another order."""
BF16_TOLERANCE = 0.012
"""Each rounding to bf16 errs by 0.17 % rms, at most 0.39 %; a gradient goes through about ten."""
SWIGLU_CACHE_TOLERANCE = 0.045
"""e4m3 moves a number by 2.6 % rms: `up` by 2.6 %, silu(gate) up to 1.28 times that where it is large; 4.3 % both."""
ROUTED_WEIGHT_TOLERANCE = 0.06
"""The weights' gradient is one number per pair; over 74 pairs the norm of their errors varies by a third (3 sigma)."""
MXFP8 = Recipe(mx_blocks=True)
SWIGLU_CACHE = fp8_rounding(Recipe(weight_quant=False, activation_quant=False, swiglu_cache=True))
CPU = torch.device("cpu")


def stock_experts(num_experts: int, hidden_size: int, intermediate_size: int):
    """Return stock transformers' experts module, whose eager loop is the witness."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    config = DeepseekV3Config(
        hidden_size=hidden_size,
        moe_intermediate_size=intermediate_size,
        n_routed_experts=num_experts,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    )
    return DeepseekV3Experts(config)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("backend", [cpu, grouped_mm, reference], ids=lambda module: module.__name__.split(".")[-1])
def test_a_backend_in_fp32_agrees_with_the_reference_in_fp64_in_its_output_and_every_gradient(backend, routing):
    inputs = case(routing)
    truth = results(reference.experts, inputs.to(torch.float64))
    assert max(errors(results(backend.experts, inputs), truth).values()) < FP32_TOLERANCE


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("rows_together", [1, 4, 64])
def test_the_cpu_backend_in_bf16_agrees_with_the_reference_however_rows_are_cut(rows_together, routing, monkeypatch):
    monkeypatch.setattr(cpu, "ROWS_TOGETHER", rows_together)
    inputs = case(routing).to(torch.bfloat16)
    truth = results(reference.experts, inputs.to(torch.float64))
    assert max(errors(results(cpu.experts, inputs), truth).values()) < BF16_TOLERANCE


@given(start=st.integers(0, 300), count=st.integers(0, 300))
def test_bf16_rows_are_cut_into_pieces_of_few_sizes(start, count):
    rows = slice(start, start + count)
    cut = cpu.pieces(rows, torch.bfloat16)
    assert [row for piece in cut for row in range(piece.start, piece.stop)] == list(range(start, start + count))
    sizes = [piece.stop - piece.start for piece in cut]
    assert len(cut) <= 2
    assert all(0 < size < cpu.ROWS_TOGETHER or size % cpu.ROWS_TOGETHER == 0 < size for size in sizes)
    assert cpu.pieces(rows, torch.float32) == [rows]


@pytest.mark.parametrize("name", ["reference", "cpu", "grouped_mm"])
def test_a_registered_backend_gives_what_stock_transformers_eager_loop_gives(name):
    inputs = case("ragged")
    module = stock_experts(*inputs.gate_up.shape[:1], 24, 16)
    outcomes = []
    for implementation in ("eager", register_experts(name, CPU, torch.float32, use_fp8=False)):
        module.config._experts_implementation = implementation

        def experts(hidden: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            functional = {"gate_up_proj": gate_up, "down_proj": down}
            return torch.func.functional_call(module, functional, (hidden, index, weight))

        outcomes.append(results(experts, inputs))
    assert max(errors(outcomes[1], outcomes[0]).values()) < FP32_TOLERANCE


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("rounding", [EXACT, BF16, fp8_rounding(Recipe())], ids=lambda rounding: rounding.name)
def test_how_many_experts_the_cpu_backend_takes_at_a_time_changes_no_bit(rounding, routing, monkeypatch):
    inputs = case(routing)
    outcomes = []
    for numbers in (1, 20 * 16, 1 << 30):  # each by itself, 20 rows or more, all at once
        monkeypatch.setattr(cpu, "NUMBERS_AT_A_TIME", numbers)
        outcomes.append(results(partial(cpu.experts, rounding=rounding), inputs))
    for name, tensor in outcomes[0].items():
        assert torch.equal(outcomes[1][name], tensor)
        assert torch.equal(outcomes[2][name], tensor)


def test_the_backward_pass_makes_no_zero_gradients_of_what_is_only_kept():
    inputs = case("random")
    leaves = [tensor.requires_grad_() for tensor in (inputs.hidden, inputs.weight, inputs.gate_up, inputs.down)]
    output = cpu.experts(leaves[0], inputs.index, *leaves[1:])
    with torch.profiler.profile(record_shapes=True) as profile:
        torch.autograd.grad(output, leaves, inputs.grad)
    num_kept = inputs.index.numel() * inputs.gate_up.shape[1]
    made = [event for event in profile.events() if event.name in ("aten::zeros", "aten::zeros_like", "aten::zero_")]
    sizes = [math.prod(shape) for event in made for shape in event.input_shapes if shape]
    assert num_kept not in sizes


def test_the_cpu_backends_gradients_agree_with_finite_differences_in_fp64():
    inputs = case("ragged", hidden_size=4, intermediate_size=3, num_experts=3).to(torch.float64)
    tensors = [inputs.hidden[:5], inputs.weight[:5], inputs.gate_up, inputs.down]
    assert torch.autograd.gradcheck(
        lambda hidden, weight, gate_up, down: cpu.experts(hidden, inputs.index[:5], weight, gate_up, down),
        [tensor.requires_grad_() for tensor in tensors],
    )


def test_a_gradient_with_stride_zero_is_taken():
    inputs = case("random")
    for backend in (cpu, grouped_mm):
        hidden = inputs.hidden.clone().requires_grad_()
        backend.experts(hidden, inputs.index, inputs.weight, inputs.gate_up, inputs.down).sum().backward()
        assert hidden.grad is not None
        assert hidden.grad.isfinite().all()


def test_an_expert_without_tokens_gets_a_gradient_of_exact_zeros():
    gradients = results(cpu.experts, case("empty experts"))
    for name in ("gate_up", "down"):
        assert gradients[name][[0, -1]].count_nonzero() == 0
        assert gradients[name][1:-1].count_nonzero() == gradients[name][1:-1].numel()


def test_two_runs_of_a_backend_give_equal_bits():
    inputs = case("random")
    first, second = (results(cpu.experts, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("rounding", "gate_up_bytes"),
    [(EXACT, 2 * 16 * 4), (SWIGLU_CACHE, 128 + 4)],  # in FP8 the 32 numbers of a row are padded to one block
    ids=["exact", "FP8"],
)
def test_the_cpu_backend_keeps_only_the_layers_input_the_gate_and_up_rows_and_the_order(rounding, gate_up_bytes):
    inputs = case("random")
    sizes = []
    tensors = inputs.hidden.requires_grad_(), inputs.index, inputs.weight, inputs.gate_up, inputs.down.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
        cpu.experts(*tensors, rounding=rounding)
    num_pairs = inputs.index.numel()
    weights = inputs.gate_up.nbytes + inputs.down.nbytes
    kept = inputs.hidden.nbytes + inputs.weight.nbytes + num_pairs * gate_up_bytes + num_pairs * 8 + 5 * 4
    assert sum(sizes) == weights + kept


@pytest.mark.parametrize("routing", ["random", "empty experts", "one expert", "ragged"])
@pytest.mark.parametrize("sizes", [(128, 128), (24, 16), (256, 192)], ids=str)
def test_a_swiglu_cache_in_fp8_leaves_the_output_alone_and_moves_the_gradients_by_e4m3s_precision(sizes, routing):
    """Nothing else is rounded here."""
    inputs = case(routing, *sizes)
    truth = results(reference.experts, inputs.to(torch.float64))
    found = errors(results(partial(cpu.experts, rounding=SWIGLU_CACHE), inputs), truth)
    assert found.pop("output") < FP32_TOLERANCE
    assert all(error > 0.02 for error in found.values()), found
    assert found.pop("weight") < ROUTED_WEIGHT_TOLERANCE
    assert max(found.values()) < SWIGLU_CACHE_TOLERANCE, found


def test_a_swiglu_cache_in_fp8_takes_a_batch_without_tokens():
    found = results(partial(cpu.experts, rounding=SWIGLU_CACHE), case("no tokens"))
    assert found["gate_up"].count_nonzero() == found["down"].count_nonzero() == 0


@pytest.mark.parametrize("rounding", [BF16, fp8_rounding(Recipe())], ids=lambda rounding: rounding.name)
def test_an_emulation_multiplies_nothing_but_rounded_operands(rounding):
    """With a rounding that is already spent on every operand of the forward pass, rounding again changes nothing."""
    inputs = case("one expert", hidden_size=128, intermediate_size=128)
    inputs.hidden = rounding.rows(inputs.hidden)
    inputs.gate_up, inputs.down = rounding.weights(inputs.gate_up), rounding.weights(inputs.down)
    truth = results(cpu.experts, inputs)["output"]
    emulated = results(lambda *tensors: cpu.experts(*tensors, rounding=rounding), inputs)["output"]
    error = errors({"output": emulated}, {"output": truth})["output"]
    assert 1e-4 < error < 0.04  # the activation is rounded all the same, by 2^-4 at most, 2.6 % in the mean


@pytest.mark.parametrize(
    ("rounding", "low", "high"),
    [(BF16, 1e-3, 1e-2), (fp8_rounding(Recipe()), 2e-2, 8e-2), (fp8_rounding(MXFP8), 2e-2, 8e-2)],
    ids=["bf16", "fp8", "mxfp8"],
)
def test_an_emulation_errs_by_its_formats_precision_in_the_output_and_every_gradient(rounding, low, high):
    inputs = case("ragged", hidden_size=128, intermediate_size=128)
    truth = results(reference.experts, inputs.to(torch.float64))
    emulated = results(lambda *tensors: cpu.experts(*tensors, rounding=rounding), inputs)
    found = errors(emulated, truth)
    assert all(low < error < high for error in found.values()), found


def test_torch_compile_takes_the_cpu_operators_without_a_break():
    inputs = case("ragged")
    compiled = torch.compile(cpu.experts, fullgraph=True, backend="aot_eager")
    assert max(errors(results(compiled, inputs), results(cpu.experts, inputs)).values()) == 0


@pytest.mark.parametrize(
    ("zeroed", "changed"),
    [
        (0, {"output", "hidden", "weight", "gate_up", "down"}),
        (1, {"hidden"}),
        (2, {"output"}),
        (3, {"hidden", "weight", "gate_up"}),
    ],
)
def test_forward_takes_the_first_and_dgrad_the_second_of_two_operands_of_a_weight(zeroed, changed):
    """MXFP8 rounds a weight once along its inputs and once along its outputs."""
    inputs, rounding = case("ragged", hidden_size=128, intermediate_size=128), fp8_rounding(MXFP8)
    operands = weight_operands([inputs.gate_up, inputs.down], rounding)
    before = results(partial(cpu.experts, operands=operands, rounding=rounding), inputs)
    operands[zeroed] = torch.zeros_like(operands[zeroed])
    after = results(partial(cpu.experts, operands=operands, rounding=rounding), inputs)
    assert {name for name in before if not torch.equal(before[name], after[name])} == changed


@pytest.mark.parametrize("rounding", ["exact", "fp8", SWIGLU_CACHE.name, MXFP8.name])
def test_the_cpu_operators_pass_opcheck(rounding):
    inputs = case("empty experts")
    arguments = [inputs.hidden, inputs.index, inputs.weight, inputs.gate_up, inputs.down]
    tensors = [x.requires_grad_() if x.is_floating_point() else x for x in arguments]
    operands = weight_operands([inputs.gate_up, inputs.down], ROUNDINGS[rounding])
    torch.library.opcheck(torch.ops.dsv3.experts_cpu, (*tensors, operands, rounding))

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsv3.fp8.linear import LowPrecisionLinear
from dsv3.fp8.recipe import Recipe
from dsv3.fp8.rounding import BF16, ROUNDINGS, fp8_rounding
from dsv3.kernels import emulated_linear
from tests.dsv3.kernels.cases import relative_error

FP8 = fp8_rounding(Recipe())
SHAPES = [(300, 256, 128), (1, 128, 128), (129, 160, 200)]  # rows, inputs, outputs


def low_precision(original: nn.Linear, rounding=FP8) -> LowPrecisionLinear:
    return LowPrecisionLinear(original, emulated_linear.product(rounding))


def rounded_product(x: Tensor, weight: Tensor, rounding=FP8) -> Tensor:
    product = emulated_linear.product(rounding)
    return product.multiply(x, [weight], product.weight_operands([weight]))[0]


def inputs(num_rows: int, num_inputs: int, num_outputs: int):
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(num_rows, num_inputs, generator=generator),
        torch.randn(num_rows, num_outputs, generator=generator),
    )
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5
    x[:, 3] *= 1e3  # an outlier feature
    return x, weight, grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "rounding",
    [FP8, BF16, fp8_rounding(Recipe(power_of_two_scales=True)), fp8_rounding(Recipe(mx_blocks=True))],
    ids=lambda rounding: rounding.name,
)
def test_all_three_products_agree_with_float64_products_of_the_same_rounded_operands(shape, rounding):
    x, weight, grad = inputs(*shape)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = rounded_product(*leaves, rounding)
    output.backward(grad)
    rows, columns, weights = rounding.rows, rounding.columns, rounding.weights
    truths = [
        (output, rows(x).double() @ weights(weight).double().t()),
        (leaves[0].grad, rows(grad).double() @ (rounding.dgrad_weights or weights)(weight).double()),
        (leaves[1].grad, columns(grad).double().t() @ columns(x).double()),
    ]
    for value, truth in truths:
        assert relative_error(value, truth) < 1e-6  # what fp32 sums of a few hundred products lose


def test_fp8_errs_by_three_mantissa_bits_in_all_three_products():
    x, weight, grad = inputs(300, 256, 128)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = rounded_product(*leaves)
    output.backward(grad)
    truths = [x.double() @ weight.double().t(), grad.double() @ weight.double(), grad.double().t() @ x.double()]
    for value, truth in zip([output, leaves[0].grad, leaves[1].grad], truths, strict=True):
        assert 0.015 < relative_error(value, truth) < 0.06


def test_a_routing_weight_commutes_with_rounding_only_under_fp32_scales():
    """Before the down projection's rounding, as here, or after the product, as in DeepSeek's inference code."""
    activation, weight, _ = inputs(512, 1024, 256)
    gate = 0.1 + 0.9 * torch.rand(512, 1, generator=torch.Generator().manual_seed(1))
    exact = (activation * gate) @ weight.t()

    def outputs(recipe):
        rounding = fp8_rounding(recipe)
        return rounded_product(activation * gate, weight, rounding), rounded_product(
            activation, weight, rounding
        ) * gate

    before, after = outputs(Recipe())
    assert relative_error(after, before) < 1e-4
    before, after = outputs(Recipe(power_of_two_scales=True))
    assert 0.03 < relative_error(after, before) < 0.05
    assert relative_error(before, exact) == pytest.approx(relative_error(after, exact), rel=0.05)


@pytest.mark.parametrize(
    ("recipe", "exact"),
    [
        (Recipe(weight_quant=False), "none"),
        (Recipe(activation_quant=False), "wgrad"),
        (Recipe(wgrad_quant=False), "wgrad"),
        (Recipe(weight_quant=False, activation_quant=False), "all"),
    ],
)
def test_each_side_is_quantized_on_its_own(recipe, exact):
    x, weight, grad = inputs(140, 256, 128)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = rounded_product(*leaves, fp8_rounding(recipe))
    output.backward(grad)
    is_exact = [
        relative_error(output, x.double() @ weight.double().t()) < 1e-6,
        relative_error(leaves[0].grad, grad.double() @ weight.double()) < 1e-6,
        relative_error(leaves[1].grad, grad.double().t() @ x.double()) < 1e-6,
    ]
    assert is_exact == {"none": [False] * 3, "wgrad": [False, False, True], "all": [True] * 3}[exact]


def test_the_layer_holds_the_very_parameters_of_the_one_it_replaces():
    original = nn.Linear(128, 256)
    layer = low_precision(original)
    assert layer.weight is original.weight
    assert layer.bias is original.bias
    assert {name: value.data_ptr() for name, value in layer.state_dict().items()} == {
        name: value.data_ptr() for name, value in original.state_dict().items()
    }


def test_leading_dimensions_and_bias_are_kept():
    original = nn.Linear(128, 256)
    x = torch.randn(2, 3, 128)
    output = low_precision(original, BF16)(x)
    assert output.shape == (2, 3, 256)
    assert relative_error(output, original(x)) < 5e-3
    flat = low_precision(original, BF16)(x.view(6, 128))
    assert torch.equal(output.view(6, 256), flat)


def test_the_layer_answers_in_autocasts_dtype():
    layer = low_precision(nn.Linear(128, 128))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 128)).dtype == torch.bfloat16
    assert layer(torch.randn(4, 128)).dtype == torch.float32


def test_loading_other_weights_is_noticed():
    layer = low_precision(nn.Linear(128, 128, bias=False))
    x = torch.randn(4, 128)
    before = layer(x)
    layer.load_state_dict({"weight": 2 * layer.weight.detach()})
    assert torch.equal(layer(x), 2 * before)


def test_an_activation_written_to_in_place_is_rounded_again():
    layer = low_precision(nn.Linear(128, 128, bias=False))
    x = torch.randn(4, 128)
    before = layer(x)
    assert torch.equal(layer(x.mul_(2)), 2 * before)


def test_numbers_that_change_behind_torchs_back_are_rounded_again():
    """As in the buffers of compiled code, which are written to without raising their version."""
    layer = low_precision(nn.Linear(128, 128, bias=False))
    memory = np.random.default_rng(0).normal(size=(4, 128)).astype(np.float32)
    x = torch.from_numpy(memory)
    before = layer(x)
    memory *= 2
    assert torch.equal(layer(x), 2 * before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor imports what torch has deprecated
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile generates C++: needs g++")
def test_generated_code_that_reuses_its_buffers_gives_what_eager_gives():
    torch.manual_seed(0)
    layers = nn.ModuleList(low_precision(nn.Linear(128, 128, bias=False)) for _ in range(2))

    def residual(x: Tensor) -> Tensor:
        for layer in layers:
            x = x + layer(torch.nn.functional.rms_norm(x, (128,)))
        return x

    x = torch.randn(40, 128)
    with torch.no_grad():
        eager, compiled = residual(x), torch.compile(residual, fullgraph=True)(x)
    # Another order of sums may move a number to its neighbour in e4m3; the rounding of another tensor errs by 0.3.
    assert (compiled - eager).norm() < 1e-3 * eager.norm()


def test_the_operators_pass_opcheck_and_compile_without_a_break():
    x, weight, _ = inputs(5, 128, 256)
    layer = low_precision(nn.Linear(128, 256))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    for weights in ([weight], [weight, weight.detach()[:64].requires_grad_()]):
        operands = layer.product.weight_operands(weights)
        torch.library.opcheck(torch.ops.dsv3.emulated_linear, (x, weights, operands, FP8.name))
    torch.library.opcheck(torch.ops.dsv3.rounded_weight, (weight.detach(), FP8.name, False))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_inference_mode_computes_the_same():
    layer = low_precision(nn.Linear(128, 128))
    x = torch.randn(4, 128)
    with torch.inference_mode():
        inside = layer(x)
        twice = layer(torch.randn(4, 128) + x)
    assert torch.equal(inside, layer(x))
    assert twice.shape == inside.shape


def test_two_products_of_one_input_give_the_bits_of_two_layers_and_round_the_input_once(monkeypatch):
    x, weight, grad = inputs(300, 256, 128)
    weights, grads = [weight, weight[:64].flip(0)], [grad, grad[:, :64] * 2]
    calls = []

    def counted(kind):
        function = getattr(FP8, kind)
        return lambda x: calls.append((kind, x.shape)) or function(x)

    counting = replace(FP8, name="counting", rows=counted("rows"), columns=counted("columns"))
    monkeypatch.setitem(ROUNDINGS, "counting", counting)

    def run(groups, rounding):
        leaf, leaves = x.clone().requires_grad_(), [w.clone().requires_grad_() for w in weights]
        product, outputs = emulated_linear.product(rounding), []
        for group in groups:
            chosen = [leaves[number] for number in group]
            outputs += product.multiply(leaf, chosen, product.weight_operands(chosen))
        torch.autograd.backward(outputs, grads)
        return [*outputs, leaf.grad, *(w.grad for w in leaves)]

    together, apart = run([[0, 1]], counting), run([[0], [1]], FP8)
    assert all(torch.equal(*pair) for pair in zip(together, apart, strict=True))
    assert sorted(calls).count(("rows", x.shape)) == 1
    assert sorted(calls).count(("columns", x.shape)) == 1

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dsv3.errors import UserError
from dsv3.fp8.recipe import Recipe
from dsv3.kernels import grouped_mm, registry
from dsv3.kernels.registry import auto_backend, register_experts
from dsv3.params.expert_backends import AUTO, AUTO_UNSUITED, BACKENDS
from tests.dsv3.kernels.cases import case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16


def test_a_chosen_backend_is_registered_with_transformers_under_a_name_that_says_what_runs():
    assert register_experts("cpu", CPU, FP32, use_fp8=False) == "dsv3_cpu_fp32"
    assert register_experts("auto", CPU, FP32, use_fp8=True) == "dsv3_fp8_emulated"
    weights_only = Recipe(activation_quant=False)
    assert register_experts("auto", CPU, FP32, True, weights_only) == "dsv3_fp8_emulated_no_activation_quant"
    assert {"dsv3_cpu_fp32", "dsv3_fp8_emulated", "dsv3_fp8_emulated_no_activation_quant"} <= set(ALL_EXPERTS_FUNCTIONS)


@pytest.mark.parametrize(
    ("device", "native", "dtype", "use_fp8", "backend"),
    [
        (CPU, False, FP32, False, "cpu"),
        (CPU, True, BF16, False, "cpu"),
        (CPU, False, BF16, False, "bf16_emulated"),
        (CPU, True, FP32, True, "fp8_emulated"),
        (CUDA, True, BF16, False, "grouped_mm"),
        (CUDA, True, FP32, False, "grouped_mm"),
        (CUDA, True, BF16, True, "triton_fp8"),
        (CUDA, False, BF16, True, "fp8_emulated"),
    ],
)
def test_auto_takes_the_fastest_backend_that_the_device_runs_natively(
    monkeypatch, device, native, dtype, use_fp8, backend
):
    monkeypatch.setattr(registry, "multiplies_bf16", lambda _: native)
    monkeypatch.setattr(registry, "multiplies_fp8", lambda device: native and device.type == "cuda")
    assert auto_backend(device, dtype, use_fp8) == backend


def test_every_backend_has_a_function_and_auto_names_only_backends():
    assert set(registry.FUNCTIONS) == set(BACKENDS)
    assert {*AUTO.values(), *AUTO_UNSUITED, *AUTO_UNSUITED.values()} <= set(BACKENDS)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "use_fp8", "message"),
    [
        ("gpu", CPU, FP32, False, "train.experts is gpu; must be one of auto, reference"),
        ("cpu", CUDA, FP32, False, "train.experts is cpu; runs on cpu, not on cuda, take auto"),
        ("grouped_mm", CPU, torch.float64, False, "computes in fp32 and bf16, not in fp64"),
        ("triton_fp8", CPU, FP32, True, "runs on cuda, not on cpu"),
        ("cpu", CPU, FP32, True, "is no FP8 backend while train.use_fp8 is true"),
        ("fp8_emulated", CPU, FP32, False, "is the FP8 backend while train.use_fp8 is false"),
    ],
)
def test_a_backend_that_cannot_run_says_why_in_one_line(name, device, dtype, use_fp8, message):
    with pytest.raises(UserError) as refused:
        register_experts(name, device, dtype, use_fp8)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("chosen", "dtype", "use_fp8", "fitting", "odd", "instead"),
    [
        ("grouped_mm", BF16, False, (256, 136), (256, 132), "reference"),
        ("grouped_mm", FP32, False, (256, 132), (254, 132), "reference"),
        ("triton_fp8", BF16, True, (256, 128), (256, 192), "fp8_emulated"),
    ],
)
def test_widths_that_a_kernel_cannot_multiply_are_refused_before_anything_runs_and_auto_takes_another(
    monkeypatch, chosen, dtype, use_fp8, fitting, odd, instead
):
    monkeypatch.setattr(registry, "multiplies_bf16", lambda _: True)
    monkeypatch.setattr(registry, "multiplies_fp8", lambda _: True)
    assert auto_backend(CUDA, dtype, use_fp8, widths=fitting) == chosen
    assert auto_backend(CUDA, dtype, use_fp8, widths=odd) == instead
    wrong = next(width for width, right in zip(odd, fitting, strict=True) if width != right)
    with pytest.raises(UserError, match=rf"train.experts is {chosen}; multiplies widths .* not {wrong}, take auto"):
        register_experts(chosen, CUDA, dtype, use_fp8, widths=odd)


def test_grouped_mm_multiplies_the_widths_that_are_let_through_and_no_others():
    for width, works in ((20, True), (18, False)):
        inputs = case("random", hidden_size=24, intermediate_size=width)
        arguments = inputs.hidden, inputs.index, inputs.weight, inputs.gate_up, inputs.down
        assert (BACKENDS["grouped_mm"].width_refusal((24, width), FP32.itemsize) is None) == works
        if works:
            grouped_mm.experts(*arguments)
        else:
            with pytest.raises(RuntimeError, match="16 bytes"):
                grouped_mm.experts(*arguments)


def test_a_gpu_of_amd_is_not_taken_for_one_that_multiplies_nvidias_e4m3(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert auto_backend(CUDA, BF16, True) == "fp8_emulated"


def test_fp8_of_neither_side_is_refused():
    with pytest.raises(UserError, match="both false; set one to true"):
        register_experts("auto", CPU, FP32, True, Recipe(weight_quant=False, activation_quant=False))


@pytest.mark.parametrize("recipe", [Recipe(weight_quant=False), Recipe(mx_blocks=True)], ids=lambda recipe: recipe.name)
def test_the_gpu_kernels_refuse_recipes_that_they_do_not_compute_and_auto_emulates_them(monkeypatch, recipe):
    monkeypatch.setattr(registry, "multiplies_fp8", lambda device: True)
    assert auto_backend(CUDA, BF16, True, recipe) == "fp8_emulated"
    message = "quantizes weights and activations, not one of them, in blocks of 128, take auto"
    with pytest.raises(UserError, match=message):
        register_experts("triton_fp8", CUDA, BF16, True, recipe)


def test_ampere_is_refused_in_one_line_and_auto_emulates_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert auto_backend(CUDA, BF16, True) == "fp8_emulated"
    with pytest.raises(UserError) as refused:
        register_experts("triton_fp8", CUDA, BF16, True)
    message = "train.experts is triton_fp8; needs a GPU of compute capability 8.9 or higher, take auto"
    assert str(refused.value) == message


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_ada_and_hopper_take_the_gpu_kernels(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert auto_backend(CUDA, BF16, True) == "triton_fp8"
    assert registry.refusal(BACKENDS["triton_fp8"], CUDA, BF16, True) is None


@pytest.mark.parametrize("hidden_dtype", [FP32, BF16])
@pytest.mark.parametrize(("name", "dtype"), [("cpu", BF16), ("grouped_mm", BF16), ("bf16_emulated", BF16)])
def test_bf16_backends_cast_fp32_master_weights_and_give_back_the_dtype_they_got(name, dtype, hidden_dtype):
    from types import SimpleNamespace

    inputs = case("random")
    module = SimpleNamespace(gate_up_proj=inputs.gate_up.requires_grad_(), down_proj=inputs.down.requires_grad_())
    function = ALL_EXPERTS_FUNCTIONS[register_experts(name, CPU, dtype, use_fp8=False)]
    with torch.autocast("cpu", BF16):
        output = function(module, inputs.hidden.to(hidden_dtype), inputs.index, inputs.weight)
    output.float().sum().backward()
    assert output.dtype == hidden_dtype
    assert module.gate_up_proj.grad.dtype == FP32
    assert module.down_proj.grad.abs().sum() > 0


def test_autocast_does_not_reach_into_an_fp32_backend():
    inputs = case("random")
    from types import SimpleNamespace

    module = SimpleNamespace(gate_up_proj=inputs.gate_up, down_proj=inputs.down)
    function = ALL_EXPERTS_FUNCTIONS[register_experts("cpu", CPU, FP32, use_fp8=False)]
    plain = function(module, inputs.hidden, inputs.index, inputs.weight)
    with torch.autocast("cpu", BF16):
        assert torch.equal(function(module, inputs.hidden, inputs.index, inputs.weight), plain)

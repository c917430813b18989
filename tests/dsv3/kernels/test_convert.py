import pytest
import torch

from dsv3.artifacts import read_json
from dsv3.fp8.linear import LowPrecisionLinear, LowPrecisionMLP
from dsv3.fp8.recipe import Recipe
from dsv3.kernels import registry
from dsv3.kernels.convert import Conversion, convert, emulate_bf16
from dsv3.kernels.registry import register_experts
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.committed import PROJECT

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "n_group": 1,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}


@pytest.fixture
def model() -> DeepseekV3ForCausalLM:
    config = DeepseekV3Config(**{**read_json(PROJECT / "mini_model/config_nano.json"), **SIZES})
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config).train()


def loss_and_gradients(model: DeepseekV3ForCausalLM) -> tuple[float, dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_everything_that_multiplies_is_converted_but_the_head_and_the_router(model):
    conversion = convert(model, Recipe(), CPU)
    assert conversion.precision == "fp8_emulated"
    assert conversion.high_precision == {"lm_head": "lm_head stays in high precision"}
    assert "model.layers.1.mlp.shared_experts.gate_proj" in conversion.converted
    partial = [
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "kv_a_proj_with_mqa")
    ]
    assert conversion.partial_blocks == partial  # 192 and 160 outputs
    assert all(isinstance(model.get_submodule(name), LowPrecisionLinear) for name in conversion.converted)
    assert not any("gate" in name.split(".")[-1:] for name in conversion.converted)


def test_what_multiplies_is_named_where_the_device_multiplies_fp8_itself_alone():
    rows, dtype = 256, torch.bfloat16
    assert Conversion("fp8", ["a"], is_native=True).kernel(CPU, rows, dtype) == "triton"  # cuBLAS on Hopper alone
    assert Conversion("fp8", is_native=True).kernel(CPU, rows, dtype) is None, "no layer is large enough"
    assert Conversion("fp8_emulated", ["a"]).kernel(CPU, rows, dtype) is None


def test_a_swiglu_rounds_its_input_once_and_its_layers_are_called_as_before(model):
    convert(model, Recipe(), CPU)
    mlps = [module for module in model.modules() if isinstance(module, LowPrecisionMLP)]
    assert len(mlps) == 2  # the dense layer's and the shared expert
    called = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        mlps[0].get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    mlps[0](torch.randn(4, 128))
    assert called == ["gate_proj", "up_proj", "down_proj"]


def test_a_layer_smaller_than_a_block_stays_and_is_listed(model):
    model.extra = torch.nn.Linear(64, 128)
    conversion = convert(model, Recipe(), CPU)
    assert conversion.high_precision["extra"] == "128x64 is smaller than one 128x128 block"


def test_the_checkpoint_knows_nothing_of_the_conversion(model):
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    convert(model, Recipe(), CPU)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert list(dict(model.named_parameters())) == [name for name in before if name in dict(model.named_parameters())]


def test_fp8_trains_every_weight_and_its_gradients_point_where_fp32s_do(model):
    exact_loss, exact = loss_and_gradients(model)
    model.set_experts_implementation(register_experts("auto", CPU, torch.float32, use_fp8=True))
    convert(model, Recipe(), CPU)
    loss, gradients = loss_and_gradients(model)
    assert loss == pytest.approx(exact_loss, rel=5e-3)
    assert loss != exact_loss
    num_nonzero = sum(int(gradient.count_nonzero()) for gradient in gradients.values())
    assert num_nonzero / sum(int(gradient.count_nonzero()) for gradient in exact.values()) > 0.999
    for name, gradient in gradients.items():
        cosine = torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0)
        assert cosine > 0.9, (name, cosine)  # least for the router, whose gradient is a difference of near-equal sums


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        (Recipe(activation_quant=False), "fp8_emulated_no_activation_quant"),
        (Recipe(power_of_two_scales=True, wgrad_quant=False), "fp8_emulated_power_of_two_scales_no_wgrad_quant"),
    ],
    ids=["one side", "scales and wgrad"],
)
def test_the_switches_are_recorded_in_the_name(model, recipe, precision):
    assert convert(model, recipe, CPU).precision == precision


def test_bf16_by_rounding_operands_is_close_to_fp32_but_not_equal(model, monkeypatch):
    monkeypatch.setattr(registry, "multiplies_bf16", lambda device: False)
    exact_loss, _ = loss_and_gradients(model)
    model.set_experts_implementation(register_experts("auto", CPU, torch.bfloat16, use_fp8=False))
    assert emulate_bf16(model).precision == "bf16_emulated"
    loss, _ = loss_and_gradients(model)
    assert 0 < abs(loss - exact_loss) < 1e-2


def test_the_emulation_of_bf16_rounds_small_layers_too(model):
    model.extra = torch.nn.Linear(64, 128)
    assert "extra" in emulate_bf16(model).converted

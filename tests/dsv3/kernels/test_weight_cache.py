from functools import partial

import pytest
import torch
from torch import nn

from dsv3.artifacts import read_json
from dsv3.fp8.linear import LowPrecisionLinear
from dsv3.fp8.recipe import Recipe
from dsv3.kernels import emulated_linear
from dsv3.kernels.convert import convert
from dsv3.kernels.registry import register_experts
from dsv3.kernels.weight_cache import cached_weights, module_operands
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3Experts, DeepseekV3ForCausalLM
from tests.committed import PROJECT
from tests.training_inputs import MICRO, WIDE

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(0))


def fp8_model() -> DeepseekV3ForCausalLM:
    config = {**read_json(PROJECT / "mini_model/config_nano.json"), **MICRO, **WIDE}
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config)).train()
    model.set_experts_implementation(register_experts("auto", CPU, torch.float32, use_fp8=True))
    convert(model, Recipe(), CPU)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(TOKENS, labels=TOKENS, mtp_loss_weight=0.3).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def num_roundings(monkeypatch) -> list[torch.Size]:
    """Return a list that gets the shape of every weight that is rounded."""
    shapes, function = [], emulated_linear.rounded_weight_op
    counted = lambda weight, *how: shapes.append(weight.shape) or function(weight, *how)  # noqa: E731
    monkeypatch.setattr(emulated_linear, "rounded_weight_op", counted)
    return shapes


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_passes_of_a_block_share_one_rounding_of_every_weight(num_roundings, is_checkpointed):
    model = fp8_model()
    if is_checkpointed:
        model.activation_checkpointing_enable()
    num_linears = sum(isinstance(module, LowPrecisionLinear) for module in model.modules())
    num_stacks = 2 * sum(isinstance(module, DeepseekV3Experts) for module in model.modules())
    for step in (1, 2):
        with cached_weights(model):
            for _micro_batch in range(3):
                gradients(model)
        assert len(num_roundings) == step * (num_linears + num_stacks)


def test_the_cache_changes_no_bit_of_any_gradient():
    model = fp8_model()
    plain = gradients(model)
    with cached_weights(model):
        cached = gradients(model)
    assert all(torch.equal(cached[name], gradient) for name, gradient in plain.items())


def change_by_optimizer(weight: nn.Parameter, **options: bool) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, **options).step()


CHANGES = {
    "in place": lambda weight: weight.detach().mul_(2),
    "data": lambda weight: weight.data.mul_(2),
    "replaced": lambda weight: setattr(weight, "data", 2 * weight.data),
    "foreach": partial(change_by_optimizer, foreach=True),
    "fused": partial(change_by_optimizer, fused=True),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_whoever_changes_a_weight_between_two_blocks_or_outside_of_one_is_noticed(change):
    layer = LowPrecisionLinear(
        nn.Linear(128, 128, bias=False), emulated_linear.product(emulated_linear.ROUNDINGS["fp8"])
    )
    x, outputs = torch.randn(4, 128), []
    for _ in range(3):
        with cached_weights(layer):
            outputs.append(layer(x).detach())
        assert torch.equal(layer(x), outputs[-1])
        CHANGES[change](layer.weight)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("change", ["in place", "foreach"])
def test_a_weight_that_changes_within_a_block_is_an_error(change):
    model = fp8_model()
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(RuntimeError, match=f"{name} changed while its operands were cached"), cached_weights(model):
        CHANGES[change](model.get_parameter(name))


def test_a_block_that_fails_leaves_no_operands_behind():
    model = fp8_model()
    with pytest.raises(KeyboardInterrupt), cached_weights(model):
        raise KeyboardInterrupt
    assert not [module for module in model.modules() if getattr(module, "cached_operands", None) is not None]


def test_a_model_in_high_precision_has_nothing_to_cache():
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**MICRO))
    model.set_experts_implementation(register_experts("auto", CPU, torch.float32, use_fp8=False))
    assert not [module for module in model.modules() if module_operands(module) is not None]


def test_operands_that_were_made_in_inference_mode_serve_there():
    model = fp8_model().eval()
    with torch.no_grad():
        plain = model(TOKENS).logits
    with torch.inference_mode(), cached_weights(model):
        assert torch.equal(model(TOKENS).logits, plain)


# Dynamo itself looks at the .grad of what flows from one graph into the next.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_code_takes_the_operands_of_each_step_and_is_compiled_once(num_roundings):
    model, graphs = fp8_model(), []
    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    torch._dynamo.reset()
    forward = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or aot_eager(graph, inputs))
    num_weights = None
    for _step in range(3):
        with cached_weights(model):
            rounded = len(num_roundings)
            num_weights = num_weights or rounded
            eager = gradients(model)
            model.zero_grad()
            for _micro_batch in range(2):
                model.zero_grad()
                forward(TOKENS, labels=TOKENS, mtp_loss_weight=0.3).loss.backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-4, atol=1e-6)
        assert len(num_roundings) == rounded
        torch.optim.AdamW(model.parameters(), lr=0.01, fused=True).step()
    assert len(num_roundings) == 3 * num_weights
    assert len(graphs) == 1
    torch._dynamo.reset()

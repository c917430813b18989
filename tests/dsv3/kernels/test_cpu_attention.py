import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dsv3.artifacts import read_json
from dsv3.kernels import cpu_attention
from dsv3.kernels.cpu_attention import attention_forward, causal_attention
from dsv3.sizing.causal_attention import BLOCK_QUERIES, blocks, num_kept_weights
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.committed import PROJECT

FP32_ROUNDING = 2e-6
"""By the norm: sums of some hundred products in another order."""
BF16_ROUNDING = 0.008
"""By the norm: two or three roundings to bf16 (0.4 % at most) on each product's way."""


def operands(num_positions, query_width=24, value_width=16, dtype=torch.float64):
    """Return query, key, value and an output's gradient of two sequences with three heads, as the model lays them."""
    generator = torch.Generator().manual_seed(num_positions)
    widths = (query_width, query_width, value_width, value_width)
    tensors = [torch.randn(2, num_positions, 3, width, generator=generator, dtype=torch.float64) for width in widths]
    return [tensor.to(dtype).transpose(1, 2).detach().requires_grad_() for tensor in tensors]


def results(attend, query, key, value, grad):
    """Return the output and the three gradients."""
    output = attend(query, key, value)
    return [output, *torch.autograd.grad(output, (query, key, value), grad)]


def torchs(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)


def ours(query, key, value):
    return causal_attention(query, key, value, 0.3)[0]


def error(found, exact):
    return float((found.double() - exact).detach().norm() / exact.detach().norm())


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, FP32_ROUNDING), (torch.bfloat16, BF16_ROUNDING)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("num_positions", [1, 2, 63, 64, 65, 128, 129, 200, 300])
def test_output_and_gradients_are_those_of_torchs_attention_in_float64(num_positions, dtype, bound):
    given = operands(num_positions, dtype=dtype)
    exact = results(torchs, *(tensor.detach().double().requires_grad_() for tensor in given))
    for found, expected in zip(results(ours, *given), exact, strict=True):
        assert (found.dtype, found.shape) == (dtype, expected.shape)
        if expected.detach().norm() < 1e-12:  # one position: its only weight is 1 whatever query and key are
            assert not found.any()
        else:
            assert error(found, expected) < bound


@pytest.mark.parametrize("number", [40, 64, 100])
def test_no_query_sees_a_later_key(number):
    query, key, value, _ = operands(150, dtype=torch.float32)
    before = ours(query, key, value)
    for tensor in (query, key, value):
        tensor.data[:, :, number:] = 1e4
    assert torch.equal(ours(query, key, value)[:, :, :number], before[:, :, :number])


def test_scores_of_any_size_give_numbers():
    query, key, value, grad = operands(100, dtype=torch.float32)
    query.data *= 1e6
    assert all(tensor.isfinite().all() for tensor in results(ours, query, key, value, grad))


@settings(deadline=None, max_examples=50)
@given(num_positions=st.integers(1, 2000), precision=st.sampled_from(["fp32", "bf16"]))
def test_blocks_cover_each_query_once_and_their_weights_lie_one_behind_the_other(num_positions, precision):
    end, at = 0, 0
    for rows, first in blocks(num_positions, precision):
        assert (rows.start, first) == (end, at)
        assert 0 < rows.stop - rows.start <= BLOCK_QUERIES[precision]
        end, at = rows.stop, at + (rows.stop - rows.start) * rows.stop
    assert (end, at) == (num_positions, num_kept_weights(num_positions, precision))
    half = num_positions * (num_positions + 1) // 2
    assert half <= at <= half + num_positions * BLOCK_QUERIES[precision] // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_torch_accepts_the_operators(dtype):
    query, key, value, grad = operands(130, dtype=dtype)
    torch.library.opcheck(causal_attention, (query, key, value, 0.3))
    weights = causal_attention(query, key, value, 0.3)[1].detach()
    given = [tensor.detach() for tensor in (grad, query, key, value)]
    torch.library.opcheck(cpu_attention.causal_attention_backward, (*given, weights, 0.3))


@pytest.fixture
def model():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "kv_lora_rank": 16}
    config = DeepseekV3Config(**{**read_json(PROJECT / "mini_model/config_nano.json"), **sizes, "vocab_size": 64})
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config).train()


def loss_and_gradients(model, **arguments):
    tokens = torch.randint(0, 64, (2, 100), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(tokens, labels=tokens, **arguments).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_autocast", [False, True], ids=["fp32", "bf16"])
def test_a_model_trains_as_with_torchs_attention(model, is_autocast):
    found = {}
    for name in ("sdpa", cpu_attention.register()):
        model.set_attn_implementation(name)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            found[name] = loss_and_gradients(model)
    (loss, grads), (own_loss, own_grads) = found.values()
    assert own_loss == pytest.approx(loss, rel=2e-3 if is_autocast else 1e-6)
    for name, grad in grads.items():
        other = torch.nn.functional.cosine_similarity(grad.flatten(), own_grads[name].flatten(), dim=0)
        assert other > (0.99 if is_autocast else 1 - 1e-5), name


def test_masks_dropout_cached_keys_and_other_types_are_left_to_torch(model, monkeypatch):
    asked = []

    def attend(query, key, value, scaling):
        asked.append(query.shape[2])
        return causal_attention(query, key, value, scaling)

    monkeypatch.setattr(cpu_attention, "causal_attention", attend)
    model.set_attn_implementation(cpu_attention.register())
    loss_and_gradients(model, position_ids=torch.arange(100)[None] % 30)
    loss_and_gradients(model, attention_mask=torch.arange(100)[None].expand(2, -1) > 3)
    query, key, value, _ = operands(8, dtype=torch.float32)
    layer = model.model.layers[0].self_attn
    attention_forward(layer, query, key, value, None, dropout=0.5, scaling=0.3)
    attention_forward(layer, query.double(), key.double(), value.double(), None, scaling=0.3)
    assert not asked
    prompt = torch.zeros(1, 3, dtype=torch.int64)
    model.eval().generate(prompt, max_new_tokens=3, do_sample=False, use_cache=True, pad_token_id=0)
    assert asked == [3] * model.config.num_hidden_layers, "the prompt; each token after it has earlier keys"


def test_documents_are_hidden_from_one_another_as_ever(model):
    positions = torch.arange(100)[None] % 30
    found = []
    for name in ("sdpa", cpu_attention.register()):
        model.set_attn_implementation(name)
        found.append(loss_and_gradients(model, position_ids=positions)[0])
    assert found[0] == found[1]
    assert found[0] != loss_and_gradients(model)[0]

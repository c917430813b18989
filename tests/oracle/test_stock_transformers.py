"""Stock transformers as the oracle: the same folder, the same logits, loss and every gradient, in both directions."""

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockModel

from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM

TOLERANCE = 1e-5
"""Largest error of a tensor, relative to its largest element: fp32 keeps 1e-7, sums of 100 terms lose a digit."""

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "intermediate_size": 32,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
TOPOLOGIES = {
    "base": {},
    "no query compression": {"q_lora_rank": None},
    "one group": {"n_group": 1, "topk_group": 1},
    "every group": {"n_group": 4, "topk_group": 4},
    "top 1": {"num_experts_per_tok": 1},
    "top 4 in two groups": {"num_experts_per_tok": 4},
    "top 6 in one group of all": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "two shared experts": {"n_shared_experts": 2},
    "no dense layer": {"first_k_dense_replace": 0},
    "two dense layers": {"first_k_dense_replace": 2},
    "all layers dense": {"first_k_dense_replace": 3},
    "tied embeddings": {"tie_word_embeddings": True},
    "yarn": {"rope_parameters": YARN},
    "yarn with mscale": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "dynamic, past its length": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        "max_position_embeddings": 6,
    },
    "rope in halves": {"rope_interleave": False},
    "gates not normalized": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "biased projections, other epsilon": {"attention_bias": True, "rms_norm_eps": 1e-3},
    "half the layers of mini": {"n_routed_experts": 16, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 4},
}


@pytest.fixture(scope="module", params=TOPOLOGIES.values(), ids=TOPOLOGIES.keys())
def pair(request, tmp_path_factory):
    """Our model, the one that stock transformers loads from our folder, and ours loaded from the folder it saved."""
    torch.manual_seed(0)
    ours = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, **request.param}))
    for _, router in ours.routers():
        router.e_score_correction_bias.uniform_(-0.3, 0.3)
    for name, parameter in ours.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    folder = tmp_path_factory.mktemp("ours")
    ours.save_pretrained(folder)
    stock, info = StockModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    folder = tmp_path_factory.mktemp("stock")
    stock.save_pretrained(folder)
    back, info = DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return ours, stock, back


@pytest.fixture(scope="module")
def ids():
    return torch.randint(SIZES["vocab_size"], (3, 10), generator=torch.Generator().manual_seed(1))


def assert_close(got, want, what=""):
    error, size = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= TOLERANCE * size, f"{what}: off by {error:.2e} of {size:.2e}"


def test_weights_survive_both_directions_bit_for_bit(pair):
    ours, stock, back = pair
    expected = ours.state_dict()
    for other in (stock.state_dict(), back.state_dict()):
        assert other.keys() == expected.keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in expected.items())


def test_logits_loss_and_every_gradient_are_equal(pair, ids):
    _, stock, back = pair
    stock.train().zero_grad()
    want = stock(ids, labels=ids)
    want.loss.backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    assert all(gradient.any() for gradient in gradients.values())
    for model in (pair[0], back):
        assert_close(model.eval()(ids).logits, want.logits, "logits")
        model.train().zero_grad()
        loss = model(ids, labels=ids).loss
        assert_close(loss, want.loss, "loss")
        loss.backward()
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, gradients.pop(name) if model is back else gradients[name], name)
    assert not gradients


@torch.no_grad()
def test_padded_batches_are_equal_where_there_are_tokens(pair, ids):
    ours, stock, _ = (model.eval() for model in pair)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 7:] = 0, 0
    got, want = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (ours, stock))
    assert_close(got, want)


@torch.no_grad()
def test_decoding_with_a_cache_is_equal(pair, ids):
    ours, stock, _ = (model.eval() for model in pair)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    stock(ids[:, :1])  # with dynamic positions it computes with the longest text it has seen, until it sees a short one
    caches = [None, None]
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 10)):
        logits = []
        for number, model in enumerate((ours, stock)):
            out = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=caches[number], use_cache=True
            )
            caches[number] = out.past_key_values
            logits.append(out.logits[mask[:, start:stop].bool()])
        assert_close(*logits, f"positions {start} to {stop}")


@torch.no_grad()
def test_the_bias_takes_part_in_the_choice(pair, ids):
    ours, stock, _ = (model.eval() for model in pair)
    if not ours.routers():
        pytest.skip("no router in this topology")
    biases = [module.e_score_correction_bias for name, module in stock.named_modules() if name.endswith("mlp.gate")]
    kept = [bias.clone() for bias in biases]
    for bias in biases:
        bias.zero_()
    without = stock(ids).logits
    for bias, value in zip(biases, kept, strict=True):
        bias.copy_(value)
    assert (without - ours(ids).logits).abs().max() > 100 * TOLERANCE

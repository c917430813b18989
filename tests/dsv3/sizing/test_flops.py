import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config
from transformers import DeepseekV3ForCausalLM as StockModel

from dsv3.params.architecture import Architecture, read_architecture
from dsv3.sizing.flops import (
    decoding_flops_per_token,
    forward_flops_per_token,
    mean_keys,
    mtp_forward_flops_per_token,
    training_flops_per_token,
)
from dsv3.sizing.parameters import mtp_parameters_by_part, num_active_parameters, parameters_by_part
from tests.committed import PROJECT

CONFIGS = PROJECT / "mini_model"
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
BATCH, TOKENS = 2, 16


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "tie_word_embeddings": True, "n_shared_experts": 2}])
def test_forward_and_training_cost_exactly_what_torch_counts_on_a_whole_square_of_attention(changes):
    sizes = SMALL | changes
    torch.manual_seed(0)
    config = DeepseekV3Config(**sizes, attn_implementation="sdpa", experts_implementation="eager", pad_token_id=None)
    model = StockModel(config).train()
    tokens = torch.randint(0, SMALL["vocab_size"], (BATCH, TOKENS))
    # The mask-less math kernel computes the whole square, so a token attends to all TOKENS keys.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logits = model(tokens, use_cache=False).logits
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        logits.float().square().mean().backward()
    architecture = Architecture(**sizes, num_nextn_predict_layers=0)
    expected = BATCH * TOKENS * forward_flops_per_token(architecture, TOKENS)
    # Rotary frequencies are a tiny outer product which torch counts and the formula does not: 2 * positions * rope / 2.
    rotary = forward.get_total_flops() - expected
    assert rotary in (0, TOKENS * SMALL["qk_rope_head_dim"], BATCH * TOKENS * SMALL["qk_rope_head_dim"])
    assert backward.get_total_flops() == 2 * expected


def test_a_training_token_costs_three_forward_passes_with_the_mean_of_the_keys_it_sees():
    architecture = Architecture(**SMALL, num_nextn_predict_layers=1)
    keys = sum(position + 1 for position in range(64)) / 64
    assert mean_keys(64) == keys
    forward = forward_flops_per_token(architecture, keys) + mtp_forward_flops_per_token(architecture, keys)
    assert training_flops_per_token(architecture, 64) == 3 * forward


@pytest.mark.parametrize("config", ["config.json", "config_tiny.json", "config_nano.json"])
def test_without_attention_a_token_costs_two_operations_per_active_matrix_weight(config):
    architecture = read_architecture(CONFIGS / config)
    parts = parameters_by_part(architecture)
    matrices = num_active_parameters(architecture) - parts["embedding"] - parts["norms"]
    assert forward_flops_per_token(architecture, 0) == 2 * matrices


def test_an_mtp_module_costs_its_active_matrices_and_the_head_again():
    architecture = Architecture(**SMALL, num_nextn_predict_layers=2)
    parts = mtp_parameters_by_part(architecture)
    visited = parts["routed_experts"] * 2 // 4
    matrices = parts["attention"] + visited + parts["shared_experts"] + parts["router"] + parts["projection"]
    head = 2 * SMALL["vocab_size"] * SMALL["hidden_size"]
    assert mtp_forward_flops_per_token(architecture, 0) == 2 * (matrices + head)


def test_decoding_from_the_latent_costs_more_per_key_and_nothing_else():
    architecture = Architecture(**SMALL, num_nextn_predict_layers=0)
    per_key = decoding_flops_per_token(architecture, 11) - decoding_flops_per_token(architecture, 10)
    assert per_key == 3 * 2 * 2 * (20 + 8 + 20)  # layers · operations · heads · (latent + rotary + latent)
    assert decoding_flops_per_token(architecture, 0) == forward_flops_per_token(architecture, 0) + per_key

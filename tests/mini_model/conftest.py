"""A tiny DeepSeek-V3 with every part, in which no two sizes are equal."""

import pytest
import torch

from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM

MICRO = {
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
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@pytest.fixture
def micro_config():
    """A function of overrides that returns a configuration."""

    def build(**overrides):
        return DeepseekV3Config(**{**MICRO, **overrides})

    return build


@pytest.fixture
def micro_model(micro_config):
    """A function of overrides that returns a model in training mode; its biases are spread, so they change choices."""

    def build(**overrides):
        torch.manual_seed(0)
        model = DeepseekV3ForCausalLM(micro_config(**overrides))
        for _, router in model.routers():
            router.e_score_correction_bias.uniform_(-0.3, 0.3)
        return model.train()

    return build


@pytest.fixture
def token_ids():
    """A function of (sequences, positions) that returns tokens."""

    def build(sequences=2, positions=12):
        generator = torch.Generator().manual_seed(1)
        return torch.randint(MICRO["vocab_size"], (sequences, positions), generator=generator)

    return build

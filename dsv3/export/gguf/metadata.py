"""The metadata of the network in a GGUF file: the keys that llama.cpp's architecture `deepseek2` reads.

llama.cpp computes MLA in its absorbed form only. All heads then share one key, the latent with the rotary part, and one
value, the latent, so the file describes a model with a single key-value head of that width. The widths before
absorption are `key_length_mla` and `value_length_mla`.

A configuration that llama.cpp would read and compute differently is refused in one line, so that no file gives wrong
results. Keys and behavior were read in llama.cpp 0c1e57098 (src/models/deepseek2.cpp, src/llama-model.cpp,
src/llama-context.cpp).
"""

import math
from typing import Any

from dsv3.errors import UserError
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import inverse_frequencies

ARCHITECTURE = "deepseek2"
SIGMOID = 2
"""llama.cpp's number of the gating function of DeepSeek-V3; `dsv3.export.source` refuses other routers."""
LITE_LAYERS = (26, 27)
"""llama.cpp takes models with these numbers of layers for DeepSeek-V2-Lite, and then reads no `q_lora_rank`."""
LATENT_NORM_EPS = 1e-6
"""Epsilon of the two norms inside attention, whatever `rms_norm_eps` is; llama.cpp has one for all norms."""
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
"""What llama.cpp uses for this architecture; it does not read these from the file."""


def network_metadata(config: DeepseekV3Config) -> dict[str, int | float | bool | str]:
    """Return keys and values of the network; `UserError` if llama.cpp would compute it differently."""
    check_expressible(config)
    values: dict[str, int | float | bool | str] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "leading_dense_block_count": min(config.first_k_dense_replace, config.num_hidden_layers),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.q_lora_rank": config.q_lora_rank or 0,  # required; 0 means none
        **expert_metadata(config),
        **rope_metadata(config),
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}


def expert_metadata(config: DeepseekV3Config) -> dict[str, int | float | bool]:
    """Return the keys of router and experts, without the architecture's prefix."""
    values: dict[str, int | float | bool] = {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        # A model without shared experts is written with one of zeros (dsv3.export.gguf.tensors).
        "expert_shared_count": max(config.n_shared_experts, 1),
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_gating_func": SIGMOID,
    }
    if config.topk_group < config.n_group:  # llama.cpp aborts where all groups may be used
        values |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return values


def rope_metadata(config: DeepseekV3Config) -> dict[str, int | float | str]:
    """Return the keys of RoPE and YaRN, without the architecture's prefix.

    The model puts YaRN's attention factor A on cosine and sine, and mscale² on all scores. llama.cpp reads an
    `attn_factor` a and a `yarn_log_multiplier` 0.1·m; it puts a on cosine and sine, and a²·(1 + 0.1·m·ln(factor))² on
    all scores. Solved for a and m; with DeepSeek's mscale = mscale_all_dim, a is 1 and m is mscale_all_dim.
    """
    rope: dict[str, Any] = config.rope_parameters or {}
    values: dict[str, int | float | str] = {
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope.get("rope_type", "default") == "default":
        return values
    attention_factor = inverse_frequencies(config)[1]
    log_factor = 0.1 * math.log(rope["factor"])
    mscale = math.sqrt(config.softmax_scale * math.sqrt(config.qk_head_dim))
    log_multiplier = 0.1 * (mscale / attention_factor - 1.0) / log_factor
    if log_multiplier == 0.0:  # llama.cpp takes 0 for unset, and multiplies a by YaRN's 1 + 0.1·ln(factor)
        attention_factor /= 1.0 + log_factor
    return values | {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.attn_factor": attention_factor,
        "rope.scaling.yarn_log_multiplier": log_multiplier,
    }


def check_expressible(config: DeepseekV3Config) -> None:
    """Raise `UserError` for the first field that llama.cpp's `deepseek2` does not support or does not read."""
    required = {"hidden_act": "silu", "attention_bias": False, "rms_norm_eps": LATENT_NORM_EPS}
    for name, value in required.items():
        if getattr(config, name) != value:
            raise UserError(
                f"config.json: {name} is {getattr(config, name)}; llama.cpp's deepseek2 computes {value} only"
            )
    if config.num_hidden_layers in LITE_LAYERS and config.q_lora_rank:
        raise UserError(
            f"config.json: num_hidden_layers is {config.num_hidden_layers}; llama.cpp takes a deepseek2 with that many "
            "layers for one without q_lora_rank; train with another number"
        )
    check_rope_expressible(config.rope_parameters or {})


def check_rope_expressible(rope: dict[str, Any]) -> None:
    """Raise `UserError` for the first of `rope_parameters` that llama.cpp does not compute."""
    rope_type = rope.get("rope_type", "default")
    if rope_type == "default":
        return
    if rope_type != "yarn":
        raise UserError(f"config.json: rope_parameters.rope_type is {rope_type}; llama.cpp reads default and yarn")
    for name, value in YARN_DEFAULTS.items():
        if rope.get(name, value) != value:
            raise UserError(f"config.json: rope_parameters.{name} is {rope[name]}; llama.cpp computes {value} only")
    if rope["factor"] <= 1:
        raise UserError(f"config.json: rope_parameters.factor is {rope['factor']}; must be > 1 for llama.cpp's YaRN")

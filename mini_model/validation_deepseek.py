"""What every DeepSeek-V3 architecture must satisfy, checked on any object with the fields of `config.json`.

Plain Python: the configuration class checks itself by these rules when it is loaded, and so can a program that reads
the file without importing torch.
"""

import json
from typing import Any, TypeGuard

GROUP_SCORE_TERMS = 2
"""A group of experts is ranked by the sum of its two best scores, so it must hold at least two."""

SMALLEST_NORMAL_FP32 = 2.0**-126
"""Smaller numbers lose precision in fp32, or are zero."""

MAX_LAYERS, MAX_SIZE = 1_000, 1 << 24
"""No published network comes near; a misplaced digit would be computed with for hours."""

MINIMUMS = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "moe_intermediate_size": 1,
    "first_k_dense_replace": 0,
    "n_routed_experts": 1,
    "n_shared_experts": 0,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 1,
    "kv_lora_rank": 1,
    "qk_nope_head_dim": 1,
    "qk_rope_head_dim": 2,
    "v_head_dim": 1,
    "max_position_embeddings": 1,
    "num_nextn_predict_layers": 0,
    "attention_dropout": 0,
    "initializer_range": 0,
    "rms_norm_eps": SMALLEST_NORMAL_FP32,  # added to a mean of squares, which may be 0, before it divides
    "routed_scaling_factor": SMALLEST_NORMAL_FP32,
}

MAXIMUMS = dict.fromkeys(MINIMUMS, MAX_SIZE) | {
    "num_hidden_layers": MAX_LAYERS,
    "num_nextn_predict_layers": MAX_LAYERS,
    "initializer_range": 1,
    "rms_norm_eps": 1,
    "routed_scaling_factor": 1_000,
}

VARIANTS: dict[str, tuple[str | int, ...]] = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
}
"""Field -> the values that this model computes, DeepSeek-V3's first. A model with another is no DeepSeek-V3 to others:
it is written as `VARIANT_TYPE`, and refused in forms that only others read."""

MODEL_TYPE = "deepseek_v3"
"""The one published `model_type` that this model computes; `kimi_k2` and later DeepSeeks differ in parts."""

VARIANT_TYPE = "deepseek_v3_variant"
"""No loader knows it, so none computes a variant's weights as DeepSeek-V3's; the code beside the weights does."""

ROPE_TYPES = ("default", "linear", "dynamic", "yarn")

ROPE_BOUNDS = {
    "rope_theta": (2, 1e12),
    "factor": (1, 1e6),
    "original_max_position_embeddings": (1, MAX_SIZE),
    "beta_fast": (0.001, 1e6),
    "beta_slow": (0.001, 1e6),
    "mscale": (0, 100),
    "mscale_all_dim": (0, 100),
    "attention_factor": (0.001, 100),
}
"""The numbers that `rope_parameters` may hold, each with the least and the most that it may be."""


def check_architecture(config: Any) -> None:
    """Raise `ValueError`, in one line, for an architecture that can't work or that this model does not implement."""
    check_sizes(config)
    check_variant(config)
    check_positions(config)
    check_routing(config)
    check_special_tokens(config)


def check_model_type(model_type: Any) -> None:
    """Raise `ValueError`, in one line, for the configuration of another architecture."""
    if model_type not in (MODEL_TYPE, VARIANT_TYPE):
        raise ValueError(f"model_type is {model_type!r}; must be {MODEL_TYPE!r}: the weights of another don't fit")


def check_sizes(config: Any) -> None:
    """Check each size alone. Every head has its own key and value, whatever `num_key_value_heads` is for."""
    for name, minimum in MINIMUMS.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{name} is {value}; must be >= {minimum:g}")
        if value is not None and value > MAXIMUMS[name]:
            raise ValueError(f"{name} is {value}; must be <= {MAXIMUMS[name]}")
    if config.attention_dropout >= 1:
        raise ValueError(f"attention_dropout is {config.attention_dropout}; must be < 1")
    heads = config.num_key_value_heads
    if heads not in (None, config.num_attention_heads):
        raise ValueError(
            f"num_key_value_heads is {heads}; must be num_attention_heads ({config.num_attention_heads}): "
            "every head has a key and a value of its own"
        )


def check_variant(config: Any) -> None:
    """Check that the file asks for no router or layer pattern that this model lacks."""
    for name, value in other_variants(config).items():
        published, *others = VARIANTS[name]
        if value not in others:
            choices = "".join(f", or {other!r}" for other in others)
            raise ValueError(f"{name} is {value!r:.60}; must be {published!r}, the router of DeepSeek-V3{choices}")


def other_variants(config: Any) -> dict[str, Any]:
    """Return the fields, with their values, in which a router is not DeepSeek-V3's; empty where others compute it."""
    stated = {name: getattr(config, name, values[0]) for name, values in VARIANTS.items()}
    return {name: value for name, value in stated.items() if value != VARIANTS[name][0]}


def check_positions(config: Any) -> None:
    """Check that rotary positions come in pairs and are scaled by a method that this model implements."""
    if config.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim is {config.qk_rope_head_dim}; must be a multiple of 2")
    rope = config.rope_parameters or {}
    rope_type, factor = rope.get("rope_type", "default"), rope.get("factor")
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"rope_parameters.rope_type is {rope_type!r:.60}; must be {' or '.join(map(repr, ROPE_TYPES))}"
        )
    if rope_type != "default" and not (is_number(factor) and factor >= 1):
        raise ValueError(f"rope_parameters.factor is {json.dumps(factor)}; must be >= 1 for rope_type {rope_type}")
    for name, (least, most) in ROPE_BOUNDS.items():
        value = rope.get(name, least)
        if not (is_number(value) and least <= value <= most):
            bounds = f"must be a number >= {least} and <= {most:g}, or left out"
            raise ValueError(f"rope_parameters.{name} is {json.dumps(value):.60}; {bounds}")
    if rope_type != "yarn" and rope.get("mscale_all_dim"):
        raise ValueError(
            f"rope_parameters.mscale_all_dim is {rope['mscale_all_dim']}; must be left out for rope_type {rope_type}: "
            "programs disagree on whether it scales there"
        )
    fast, slow = rope.get("beta_fast", 32), rope.get("beta_slow", 1)
    if fast < slow:
        raise ValueError(
            f"rope_parameters.beta_fast is {fast}; must be >= {slow}, beta_slow: fast dimensions are extrapolated"
        )


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether `value` is a number; booleans, which Python counts among them, are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_routing(config: Any) -> None:
    """Check that group-limited routing can choose its experts; else it would fail or misroute later."""
    experts, groups = config.n_routed_experts, config.n_group
    if experts % groups:
        raise ValueError(f"n_group is {groups}; must divide n_routed_experts ({experts})")
    size = experts // groups
    if groups > 1 and size < GROUP_SCORE_TERMS:
        most = experts // GROUP_SCORE_TERMS
        raise ValueError(f"n_group is {groups}; must be <= {most}, half of n_routed_experts ({experts}), or 1")
    if config.topk_group > groups:
        raise ValueError(f"topk_group is {config.topk_group}; must be <= n_group ({groups})")
    reachable = config.topk_group * size
    if config.num_experts_per_tok > reachable:
        where = f"topk_group ({config.topk_group}) of n_group ({groups}) groups of n_routed_experts ({experts})"
        raise ValueError(
            f"num_experts_per_tok is {config.num_experts_per_tok}; must be <= {reachable}, the experts of {where}"
        )


def check_special_tokens(config: Any) -> None:
    """Check that the ids of special tokens are in the vocabulary; the embedding has no row for another."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None and not 0 <= token_id < config.vocab_size:
                raise ValueError(
                    f"{name} is {token_id}; must be null, or >= 0 and < {config.vocab_size}, the vocab_size"
                )

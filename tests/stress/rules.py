"""What must hold for every input that the stages accept, written without looking at how they decide it.

A rule is a sentence and a predicate. An accepted input that breaks one is accepted nonsense.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mini_model.validation_deepseek import VARIANTS

Rules = dict[str, Callable[..., bool]]


def _numbers(value: Any) -> list[float]:
    """Return all numbers in a value, booleans left out."""
    if isinstance(value, dict | list):
        return [n for each in (value.values() if isinstance(value, dict) else value) for n in _numbers(each)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [t for each in (value.values() if isinstance(value, dict) else value) for t in _texts(each)]
    return [value] if isinstance(value, str) else []


def _kind(value: Any) -> str:
    """Return the kind of a value: a whole number may stand where a fraction may, nothing else for anything else."""
    kinds = {bool: "bool", int: "number", float: "number", str: "text", list: "list", type(None): "none"}
    return kinds.get(type(value), "other")


MAY_BE_NULL = {
    *("path", "hub_id", "hub_config_name", "hub_revision", "memory_budget_gib"),
    *("init_from", "resume_from_checkpoint", "aim_repo", "experiment"),
}
SHARES = ("validation_fraction", "test_fraction", "warmup_ratio", "min_lr_ratio", "bias_freeze_ratio", "top_p")
DAY_S = 86_400

PARAMS: Rules = {
    "the sections and keys are those of params.yaml": lambda p, q: (
        set(p) == set(q) and all(set(p[s]) == set(q[s]) for s in q if isinstance(q[s], dict))
    ),
    "every value has its kind": lambda p, q: all(
        _kind(p[s][k]) == _kind(v) or (k in MAY_BE_NULL and _kind(p[s][k]) in ("none", "text", "number"))
        for s in q
        if isinstance(q[s], dict)
        for k, v in q[s].items()
    ),
    "what counts something is a whole number": lambda p, q: all(
        isinstance(p[s][k], int)
        for s in q
        if isinstance(q[s], dict)
        for k, v in q[s].items()
        if isinstance(v, int) and not isinstance(v, bool)
    ),
    "numbers are finite": lambda p, q: all(math.isfinite(n) for n in _numbers(p)),
    "what counts something fits 64 bits": lambda p, q: all(
        p[s][k] < 2**63
        for s in q
        if isinstance(q[s], dict)
        for k, v in q[s].items()
        if isinstance(v, int) and not isinstance(v, bool)
    ),
    "shares lie between 0 and 1": lambda p, q: all(
        0 <= v <= 1 for s in q if isinstance(q[s], dict) for k, v in p[s].items() if k in SHARES
    ),
    "nothing is smaller than nothing": lambda p, q: all(
        n >= 0
        for s in p
        for k, v in (p[s].items() if isinstance(p[s], dict) else [])
        if k != "max_steps"
        for n in _numbers(v)
    ),
    "a wait ends within a day": lambda p, q: 0 < p["data"]["timeout_s"] <= DAY_S,
    "the learning rate moves weights": lambda p, q: 1e-10 <= p["train"]["learning_rate"] <= 1,
    "a step shrinks no weight past zero": lambda p, q: p["train"]["learning_rate"] * p["train"]["weight_decay"] < 1,
    "no step sees a sequence twice": lambda p, q: (
        p["train"]["per_device_train_batch_size"] * p["train"]["gradient_accumulation_steps"] < 2**20
    ),
    "the training ends": lambda p, q: p["train"]["max_steps"] <= 10**9 and p["train"]["num_train_epochs"] <= 1e6,
    "the page of samples ends": lambda p, q: p["sample"]["num_return_sequences"] * len(p["sample"]["prompts"]) <= 10**4,
    "evaluation skips no token": lambda p, q: p["evaluate"]["stride"] <= p["evaluate"]["block_size"],
    "processes share a batch": lambda p, q: (
        p["train"]["gradient_accumulation_steps"] % p["runtime"]["num_processes"] == 0
    ),
    "there is a prompt": lambda p, q: bool(p["sample"]["prompts"]),
}
"""Of parameters `p`, where `q` are those that were changed."""

FREE = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
    *("_attn_implementation", "chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id"),
    *("output_attentions", "output_hidden_states", "problem_type", "return_dict", "use_return_dict"),
    *("head_dim", "qk_head_dim", "aux_loss_alpha", "ep_size", "pretraining_tp", "quantization_config", "seq_aux"),
}
"""Fields of published configurations that change no number here."""
OPTIONAL = {
    *("num_key_value_heads", "attention_bias", "attention_dropout", "initializer_range", "rms_norm_eps"),
    *("norm_topk_prob", "routed_scaling_factor", "scoring_func", "topk_method", "moe_layer_freq", "rope_parameters"),
    *("rope_interleave", "model_type", "hidden_act", "use_cache", "output_router_logits"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "rope_theta", "rope_scaling"),
}
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "q_lora_rank"),
    *("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings"),
)

ARCHITECTURE: Rules = {
    "every field is known": lambda a, b: set(a) <= set(b) | OPTIONAL | FREE,
    "no field is missing": lambda a, b: set(b) <= set(a) | OPTIONAL | FREE,
    "every value has its kind": lambda a, b: all(
        _kind(a[k]) == _kind(v) or "none" in (_kind(a[k]), _kind(v))
        for k, v in b.items()
        if k in a and k not in FREE and not k.endswith("token_id")
    ),
    "sizes are whole, positive, and such as exist": lambda a, b: all(
        isinstance(a[k], int) and 0 < a[k] <= 2**24 for k in SIZES if a.get(k) is not None
    ),
    "numbers are finite": lambda a, b: all(math.isfinite(n) for k in a if k not in FREE for n in _numbers(a[k])),
    "the router is one that the model has": lambda a, b: (
        all(a.get(name, values[0]) in values for name, values in VARIANTS.items())
        and a["n_routed_experts"] % a["n_group"] == 0
        and a["num_experts_per_tok"] <= a["topk_group"] * a["n_routed_experts"] // a["n_group"]
    ),
    "norms don't divide by zero": lambda a, b: 0 < a.get("rms_norm_eps", 1e-6) <= 1,
    "special tokens are in the vocabulary": lambda a, b: all(
        0 <= n < a["vocab_size"] for k in a if k.endswith("token_id") for n in _numbers([a[k]])
    ),
}
"""Of an architecture `a`, where `b` is the one that was changed."""


def trains_a_step(path: Path) -> bool:
    """Return whether a model of the configuration at `path` has a finite loss and finite gradients; True if large."""
    import torch

    from dsv3.params.architecture import read_architecture
    from dsv3.sizing.parameters import num_parameters
    from dsv3.training.model import build_model

    a = read_architecture(path)
    if num_parameters(a) > 5e6 or a.num_hidden_layers > 50:
        return True
    model = build_model(path, seed=0)
    length = min(16, a.max_position_embeddings)
    ids = torch.randint(0, a.vocab_size, (2, length))
    if length < 2 + a.num_nextn_predict_layers:
        return True
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in gradients)


def broken(rules: Rules, *values: Any) -> list[str]:
    """Return the rules that do not hold; a rule that fails does not hold."""
    found = []
    for sentence, holds in rules.items():
        try:
            if not holds(*values):
                found.append(sentence)
        except Exception as error:
            found.append(f"{sentence} ({type(error).__name__}: {error})")
    return found

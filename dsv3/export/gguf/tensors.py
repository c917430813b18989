"""The weights under llama.cpp's names and in its layout: architecture `deepseek2`.

They differ from DeepSeek's files in four ways. `kv_b_proj` is split into its two halves, and the half for keys is
transposed per head, since llama.cpp multiplies the queries by it (absorbed MLA). The experts of a layer are stacked. A
model without shared experts gets one of zeros, which adds exactly nothing, because llama.cpp's graph requires one.
Where pairs of rotary dimensions lie half a head apart (`rope_interleave: false`), the rows of the two projections that
make them are reordered into adjacent pairs, the only form that llama.cpp rotates; queries and keys are reordered alike,
so the scores stay the same.

MTP modules are left out, as llama.cpp's own converter does for DeepSeek-V3: they draft, and the language model does not
need them.

Letters: H num_attention_heads, N qk_nope_head_dim, U v_head_dim, C kv_lora_rank
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mini_model.configuration_deepseek import DeepseekV3Config

Weights = Callable[[str], Tensor]
"""From the name of a weight to the weight."""

NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
MATRICES = ("gate", "up", "down")


def gguf_tensors(config: DeepseekV3Config, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of the whole file, from weights under DeepSeek's names.

    Values are not read, so weights on the meta device give names and shapes.
    """
    yield "token_embd.weight", weights("model.embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        for name, tensor in layer_tensors(
            config, layer, lambda key, at=f"model.layers.{layer}": weights(f"{at}.{key}")
        ):
            yield f"blk.{layer}.{name}", tensor
    yield "output_norm.weight", weights("model.norm.weight")
    if not config.tie_word_embeddings:
        yield "output.weight", weights("lm_head.weight")


def layer_tensors(config: DeepseekV3Config, layer: int, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of a layer, from weights under DeepSeek's names within it."""
    for name, gguf_name in NORMS.items():
        yield f"{gguf_name}.weight", weights(f"{name}.weight")
    yield from attention_tensors(config, lambda key: weights(f"self_attn.{key}.weight"))
    if layer < config.first_k_dense_replace:
        for matrix in MATRICES:
            yield f"ffn_{matrix}.weight", weights(f"mlp.{matrix}_proj.weight")
    else:
        yield from moe_tensors(config, lambda key: weights(f"mlp.{key}"))


def attention_tensors(config: DeepseekV3Config, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of a layer's attention."""
    if config.q_lora_rank is None:
        yield "attn_q.weight", interleave_rope_rows(config, weights("q_proj"), config.qk_nope_head_dim)
    else:
        yield "attn_q_a.weight", weights("q_a_proj")
        yield "attn_q_a_norm.weight", weights("q_a_layernorm")
        yield "attn_q_b.weight", interleave_rope_rows(config, weights("q_b_proj"), config.qk_nope_head_dim)
    yield "attn_kv_a_mqa.weight", interleave_rope_rows(config, weights("kv_a_proj_with_mqa"), config.kv_lora_rank)
    yield "attn_kv_a_norm.weight", weights("kv_a_layernorm")
    heads = weights("kv_b_proj").unflatten(0, (config.num_attention_heads, -1))
    w_uk_HNC, w_uv_HUC = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    yield "attn_k_b.weight", w_uk_HNC.mT
    yield "attn_v_b.weight", w_uv_HUC
    yield "attn_output.weight", weights("o_proj")


def moe_tensors(config: DeepseekV3Config, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of a layer's mixture of experts."""
    yield "ffn_gate_inp.weight", weights("gate.weight")
    yield "exp_probs_b.bias", weights("gate.e_score_correction_bias")
    for matrix in MATRICES:
        experts = [weights(f"experts.{expert}.{matrix}_proj.weight") for expert in range(config.n_routed_experts)]
        yield f"ffn_{matrix}_exps.weight", torch.stack(experts)
        shared = (
            weights(f"shared_experts.{matrix}_proj.weight") if config.n_shared_experts else torch.zeros_like(experts[0])
        )
        yield f"ffn_{matrix}_shexp.weight", shared


def interleave_rope_rows(config: DeepseekV3Config, weight: Tensor, num_plain: int) -> Tensor:
    """Return `weight`, whose heads are `num_plain` rows and the rotary ones, with pairs of the latter adjacent."""
    if config.rope_interleave:
        return weight
    heads = weight.unflatten(0, (-1, num_plain + config.qk_rope_head_dim))
    plain, rotary = heads.split([num_plain, config.qk_rope_head_dim], dim=1)
    adjacent = rotary.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([plain, adjacent], dim=1).flatten(0, 1)

"""DeepSeek-V3, to be read beside its technical report (arXiv:2412.19437), whose equation numbers the docstrings cite.

From bottom to top: normalization and positions; multi-head latent attention (§2.1.1); the mixture of experts with its
sigmoid router and loss-free balancing (§2.1.2); the decoder layer, which with three more weights is a multi-token
prediction (MTP) module (§2.2); the trunk; the language model with its losses.

Two parts are simple here and can be replaced by faster ones of the same value: `model.set_experts_implementation(name)`
replaces the loop of `DeepseekV3Experts`, and `model.cross_entropy` may be any function of the same signature.

Weights have DeepSeek's names. On disk each expert has its own matrices, in memory they are stacked; transformers
converts. Stock transformers loads the same folder without this file and computes the same logits, unless the router is
another (`validation_deepseek.VARIANTS`). This file adds what it lacks: losses, MTP modules, load counts, a router in
fp32, decoding on the latent cache itself.

Letters: B sequences, S positions, T tokens, X keys, D hidden_size, F intermediate_size, V vocab_size,
H num_attention_heads, N qk_nope_head_dim, P qk_rope_head_dim, U v_head_dim, C kv_lora_rank, M queries of all heads,
E n_routed_experts, K num_experts_per_tok, G n_group, R rows
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, maybe_autocast
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_deepseek import DeepseekV3Config
from .validation_deepseek import GROUP_SCORE_TERMS

logger = logging.get_logger(__name__)

IGNORED_LABEL = -100  # positions without a target, by Hugging Face's convention


# ---------------------------------------------------------------------------------------- normalization, positions


class DeepseekV3RMSNorm(nn.Module):
    """Scales each vector to a root mean square of one, then by a learned weight per dimension."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` normalized over its last dimension, computed in the weight's dtype (fp32 in training)."""
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


class Float32Buffers(nn.Module):
    """Keeps the buffers named in `float32_buffers` in fp32 when the module is cast, as in `model.to(torch.bfloat16)`.

    A bf16 number near 0.5 has a spacing of 0.004: an expert's bias, moved in steps of 0.001, would stop there.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Buffers":
        """Apply `fn` (`to`, `cuda`, `half` and the like call this), then restore the dtype of those buffers."""
        before = {name: self._buffers[name] for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != torch.float32:
                self._buffers[name] = old.to(device=new.device, dtype=torch.float32)
        return self


class DeepseekV3RotaryEmbedding(Float32Buffers):
    """Computes RoPE's angles of positions, with YaRN's frequencies where `rope_parameters` asks for them."""

    float32_buffers = ("inv_freq",)

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        inv_freq, self.attention_factor = inverse_frequencies(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the positions (B, S), on `x`'s device, in fp32: (B, S, P / 2) each."""
        inv_freq = self.inv_freq.to(x.device)
        if (self.config.rope_parameters or {}).get("rope_type") == "dynamic":  # of the sequence's length
            inv_freq = inverse_frequencies(self.config, x.device, int(position_ids.max()) + 1)[0]
        angles = position_ids[..., None].float() * inv_freq
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor


def inverse_frequencies(
    config: DeepseekV3Config, device: torch.device | None = None, length: int | None = None
) -> tuple[Tensor, float]:
    """Return RoPE's P / 2 angular frequencies and YaRN's factor on cosine and sine (1 without YaRN).

    YaRN (arXiv:2309.00071) divides the slow frequencies by `factor`, leaves the fast ones, and blends in between.
    Only `dynamic` depends on the sequence's `length`.
    """
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device, length)
    exponents = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float) / config.qk_rope_head_dim
    return 1.0 / rope["rope_theta"] ** exponents, 1.0


def apply_rotary(x_BHSP: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    """Return `x` with each pair of dimensions rotated by its position's angle; first halves of all pairs come first.

    A pair is (2i, 2i + 1) if `interleave`, else (i, i + P / 2). Queries and keys come out in the same order, so their
    product doesn't depend on it. Cosines and sines are those of `DeepseekV3RotaryEmbedding`.
    """
    cos, sin = cos[:, None], sin[:, None]  # the same for all heads
    first, second = (x_BHSP[..., 0::2], x_BHSP[..., 1::2]) if interleave else x_BHSP.chunk(2, dim=-1)
    rotated_BHSP = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated_BHSP.to(x_BHSP.dtype)


# ---------------------------------------------------------------------------------------- multi-head latent attention


class DeepseekV3Attention(nn.Module):
    """Multi-head latent attention: all heads' keys and values are linear in one narrow latent per token (§2.1.1).

    Only that latent (C numbers) and one rotated key shared by all heads (P numbers) are cached. There are two ways to
    attend to them:

    - *expanded*: compute every head's keys and values from the latents, then attend as usual (training, prefill);
    - *absorbed*: since q·(W^UK c) = (W^UKᵀ q)·c, move the projections to the query and the output, and attend to the
      latents themselves. All heads then share one key and one value per position (decoding).

    Both give the same result up to rounding. The absorbed form multiplies more per query and saves the expansion per
    cached position. The form with fewer multiplications is used.
    """

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True  # read by transformers' attention functions when they get no mask
        self.num_heads = config.num_attention_heads
        self.kv_dims = [config.qk_nope_head_dim, config.v_head_dim]
        self.scaling = config.softmax_scale

        heads, bias = config.num_attention_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = DeepseekV3RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        down = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, down, bias=bias)
        self.kv_a_layernorm = DeepseekV3RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * sum(self.kv_dims), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return u_t of equation 11 for every position, and the attention weights where the implementation has them."""
        q_nope_BHSN, q_rope_BHSP = self.queries(hidden_states, *position_embeddings)
        latent_B1XC, k_rope_B1XP = self.latents(hidden_states, *position_embeddings)
        if past_key_values is not None:
            latent_B1XC, k_rope_B1XP = past_key_values.update(latent_B1XC, k_rope_B1XP, self.layer_idx)

        num_queries, num_keys = q_nope_BHSN.shape[2], latent_B1XC.shape[2]
        absorbs = self.should_absorb(num_queries, num_keys, attention_mask)
        attend = self.attend_absorbed if absorbs else self.attend_expanded
        out_BSHU, weights = attend(q_nope_BHSN, q_rope_BHSP, latent_B1XC, k_rope_B1XP, attention_mask)
        return self.o_proj(out_BSHU.flatten(2)), weights

    def queries(self, hidden_BSD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return q^C and q^R of every head, (B, H, S, N) and (B, H, S, P): equations 6 to 8."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(hidden_BSD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_BSD)))
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q_nope, q_rope = q.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1)
        return q_nope, apply_rotary(q_rope, cos, sin, self.config.rope_interleave)

    def latents(self, hidden_BSD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalized c^KV and k^R, (B, 1, S, C) and (B, 1, S, P): equations 1 and 3, all that is cached."""
        down = self.kv_a_proj_with_mqa(hidden_BSD)[:, None]
        latent, k_rope = down.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
        return self.kv_a_layernorm(latent), apply_rotary(k_rope, cos, sin, self.config.rope_interleave)

    def attend_expanded(
        self, q_nope_BHSN: Tensor, q_rope_BHSP: Tensor, latent_B1XC: Tensor, k_rope_B1XP: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return o of equation 10, (B, S, H, U), from keys and values of every head: equations 2, 4, 5 and 9."""
        kv = self.kv_b_proj(latent_B1XC[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope_BHXN, value_BHXU = kv.split(self.kv_dims, dim=-1)
        query = torch.cat([q_nope_BHSN, q_rope_BHSP], dim=-1)
        key = torch.cat([k_nope_BHXN, k_rope_B1XP.expand(-1, self.num_heads, -1, -1)], dim=-1)
        dropout = self.config.attention_dropout if self.training else 0.0
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager_attention)
        return attention(self, query, key, value_BHXU, mask, dropout=dropout, scaling=self.scaling)

    def attend_absorbed(
        self, q_nope_BHSN: Tensor, q_rope_BHSP: Tensor, latent_B1XC: Tensor, k_rope_B1XP: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return o of equation 10, (B, S, H, U), without expanding the latents; `mask` as `eager_attention`'s."""
        w_uk_HNC, w_uv_HUC = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)).split(self.kv_dims, dim=1)
        latent_BXC, k_rope_BXP = latent_B1XC[:, 0], k_rope_B1XP[:, 0]
        # One shared key: the heads of a query are rows of the same matrix product.
        q_latent_BMC = (q_nope_BHSN @ w_uk_HNC).flatten(1, 2)
        scores_BMX = q_latent_BMC @ latent_BXC.mT + q_rope_BHSP.flatten(1, 2) @ k_rope_BXP.mT
        scores_BHSX = scores_BMX.unflatten(1, (self.num_heads, -1)) * self.scaling
        weights_BHSX = attention_weights(scores_BHSX, mask).to(latent_BXC.dtype)
        out_BHSC = (weights_BHSX.flatten(1, 2) @ latent_BXC).unflatten(1, (self.num_heads, -1))
        return (out_BHSC @ w_uv_HUC.mT).transpose(1, 2), weights_BHSX

    def should_absorb(self, num_queries: int, num_keys: int, mask: Tensor | None) -> bool:
        """Return whether the absorbed form multiplies less, and can read the mask and `kv_b_proj.weight`."""
        if self.training or num_queries == num_keys or not is_plain_linear(self.kv_b_proj):
            return False
        readable = num_queries == 1 if mask is None else isinstance(mask, Tensor) and mask.ndim == 4
        expanded_width, latent = sum(self.kv_dims), self.config.kv_lora_rank
        # Per head and position: expanding costs C (N + U); attending costs 2 C instead of N + U for each query.
        return readable and num_queries * (2 * latent - expanded_width) < latent * expanded_width


def is_plain_linear(layer: nn.Module) -> bool:
    """Return whether a product with `layer.weight` is what a call of `layer` computes.

    It is not where an adapter (LoRA) wraps the layer, a hook fetches its weight, or the weight is quantized or sharded.
    """
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    is_replaced = "forward" in layer.__dict__  # as accelerate does for offloaded layers
    return type(layer.weight) is nn.Parameter and layer.bias is None and not is_replaced


def attention_weights(scores_BHSX: Tensor, mask: Tensor | None) -> Tensor:
    """Return the softmax over X in fp32; `mask` is boolean (true: attends) or is added to the scores."""
    if mask is not None and mask.dtype == torch.bool:
        # Not −inf: a padded query may attend to no key, and must not become NaN.
        scores_BHSX = scores_BHSX.masked_fill(~mask, torch.finfo(scores_BHSX.dtype).min)
    elif mask is not None:
        scores_BHSX = scores_BHSX + mask
    return scores_BHSX.softmax(dim=-1, dtype=torch.float32)


def eager_attention(  # noqa: PLR0913 (the signature of transformers' attention functions)
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return attention's output, (B, S, H, U), and its weights: the reference of transformers' implementations."""
    weights_BHSX = attention_weights(query @ key.mT * scaling, mask).to(query.dtype)
    weights_BHSX = F.dropout(weights_BHSX, p=dropout, training=module.training)
    return (weights_BHSX @ value).transpose(1, 2), weights_BHSX


# ---------------------------------------------------------------------------------------- mixture of experts


class DeepseekV3MLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`. The dense layers' network, and the shared experts as one."""

    def __init__(self, config: DeepseekV3Config, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output, of `x`'s shape."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


SCORING = {"sigmoid": torch.sigmoid}
"""`scoring_func` -> its function, which leaves a token's logits in their order."""


def affinities(logits_TE: Tensor, config: DeepseekV3Config) -> Tensor:
    """Return each token's affinity to each expert, (T, E), all positive: equation 15."""
    return SCORING[config.scoring_func](logits_TE)


class DeepseekV3TopkRouter(Float32Buffers):
    """Chooses K experts per token by affinity, within the best `topk_group` groups (equations 13 to 16).

    `e_score_correction_bias` is added to the affinities for the choice and nowhere else. No gradient reaches it. The
    training loop lowers it for overloaded experts and raises it for underloaded ones, by the counts in `expert_load`,
    and then zeroes the counts (§2.1.2, auxiliary-loss-free load balancing).

    Everything here is fp32, whatever the model's dtype or autocast: in bf16, affinities 0.4 % apart are equal, and the
    order of the experts would decide.
    """

    float32_buffers = ("e_score_correction_bias",)

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.counts_when_evaluating = False
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.n_routed_experts, dtype=torch.float32))
        self.expert_load = nn.Buffer(torch.zeros(config.n_routed_experts, dtype=torch.int64), persistent=False)

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits (T, E), the gate values (T, K) and the chosen experts (T, K)."""
        with maybe_autocast(hidden_TD.device.type, enabled=False):
            logits_TE = F.linear(hidden_TD.float(), self.weight.float())
        scores_TE = affinities(logits_TE, self.config)
        index_TK = self.chosen_experts(scores_TE)
        gates_TK = scores_TE.gather(1, index_TK)
        if self.config.norm_topk_prob:
            gates_TK = gates_TK / (gates_TK.sum(dim=1, keepdim=True) + 1e-20)
        return logits_TE, gates_TK * self.config.routed_scaling_factor, index_TK

    @torch.no_grad()
    def chosen_experts(self, scores_TE: Tensor) -> Tensor:
        """Return the top K of s + b, (T, K), among the groups whose two best experts have the largest sums of s + b."""
        biased_TE = scores_TE + self.e_score_correction_bias
        groups, kept_groups = self.config.n_group, self.config.topk_group
        if kept_groups < groups:
            grouped = biased_TE.unflatten(1, (groups, -1))
            score_TG = grouped.topk(GROUP_SCORE_TERMS, dim=-1).values.sum(dim=-1)
            kept_TG = multi_hot(score_TG.topk(kept_groups, dim=-1, sorted=False).indices, groups)
            biased_TE = grouped.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)
        return biased_TE.topk(self.config.num_experts_per_tok, dim=-1, sorted=False).indices

    @torch.no_grad()
    def count(self, index_TK: Tensor) -> None:
        """Add the number of tokens of each expert to `expert_load`, in training or if `counts_when_evaluating`."""
        if self.training or self.counts_when_evaluating:
            self.expert_load.add_(multi_hot(index_TK, self.config.n_routed_experts).sum(dim=0))


def multi_hot(index_TK: Tensor, width: int) -> Tensor:
    """Return a boolean matrix (T, width), true in row t at the columns `index[t]`."""
    zeros = torch.zeros(index_TK.shape[0], width, dtype=torch.bool, device=index_TK.device)
    return zeros.scatter_(1, index_TK, 1)  # not True, which torch.jit.trace can't record


GROUPED_MM_ALIGNMENT = 16
"""Bytes of which a row that `grouped_mm` multiplies must be a multiple."""


@use_experts_implementation
class DeepseekV3Experts(nn.Module):
    """All routed experts of a layer, stacked: expert e is a SwiGLU with weights `gate_up_proj[e]` and `down_proj[e]`.

    This loop follows the equations. Fast implementations are tested against it.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return, for each row of `hidden_states` (T, D), its experts' outputs weighted by its K gates: equation 12."""
        out_TD = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token_R, choice_R = torch.where(top_k_index == expert)
            gate_RF, up_RF = F.linear(hidden_states[token_R], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y_RD = F.linear(self.act_fn(gate_RF) * up_RF, self.down_proj[expert])
            y_RD = y_RD * top_k_weights[token_R, choice_R, None]
            out_TD.index_add_(0, token_R, y_RD.to(out_TD.dtype))
        return out_TD


class DeepseekV3MoE(nn.Module):
    """The routed experts that the router chooses, plus shared experts for every token: equation 12."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.gate = DeepseekV3TopkRouter(config)
        self.experts = DeepseekV3Experts(config)
        shared_width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = DeepseekV3MLP(config, shared_width) if shared_width else None

    @property
    def router(self) -> DeepseekV3TopkRouter:
        """The router, which is `gate` itself or, after an adapter (LoRA) has wrapped it, within `gate`."""
        return next(module for module in self.gate.modules() if isinstance(module, DeepseekV3TopkRouter))

    def forward(self, hidden_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output, of the input's shape, the router's logits and its choice. No token is dropped."""
        x_TD = hidden_BSD.flatten(0, 1)
        logits_TE, gates_TK, index_TK = self.gate(x_TD)
        y_TD = self.experts(x_TD, index_TK, gates_TK)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.view_as(hidden_BSD), logits_TE, index_TK


def sequence_balance_loss(logits_TE: Tensor, config: DeepseekV3Config, num_sequences: int) -> Tensor:
    """Return Σ f_i P_i of one layer, the mean over sequences: equations 17 to 20 without α. It is 1 at balance.

    f counts the top K of the affinities *without* the bias, and has no gradient; P is the mean normalized affinity.
    """
    num_experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    scores_BSE = affinities(logits_TE, config).unflatten(0, (num_sequences, -1))
    hits_TE = multi_hot(logits_TE.topk(top_k, dim=-1, sorted=False).indices, num_experts)
    f_BE = hits_TE.view_as(scores_BSE).float().mean(dim=1) * (num_experts / top_k)
    p_BE = (scores_BSE / scores_BSE.sum(dim=-1, keepdim=True)).mean(dim=1)
    return (f_BE * p_BE).sum(dim=-1).mean()


# ---------------------------------------------------------------------------------------- layers


class DeepseekV3DecoderLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward network, each normalized before and added to the residual stream.

    Layers from number `num_hidden_layers` on are the multi-token prediction (MTP) modules. Such a module has three more
    weights: `enorm`, `hnorm` and `eh_proj` merge the previous state with the embedding of a later token before the
    layer, and `shared_head.norm` normalizes after it.

    MTP modules have no class of their own. DeepSeek stores them as further `layers`, so they stand at the end of the
    same list; and transformers' `MtpModel` takes the class of the last entry for a plain layer, and builds its drafting
    modules around layers of this class.
    """

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__()
        is_dense = layer_idx < min(config.first_k_dense_replace, config.num_hidden_layers)
        self.is_mtp_module = layer_idx >= config.num_hidden_layers
        self.self_attn = DeepseekV3Attention(config, layer_idx)
        self.mlp = DeepseekV3MLP(config, config.intermediate_size) if is_dense else DeepseekV3MoE(config)
        self.input_layernorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.is_mtp_module:
            self.enorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.hnorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
            self.shared_head = nn.ModuleDict({"norm": DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(
        self,
        hidden_states: Tensor,
        later_embeds: Tensor | None = None,
        output_routing: bool = False,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the layer's output; with `output_routing`, also its router's logits and choice (None if dense).

        `later_embeds` is given to MTP modules only. The choice is returned, not counted here: under activation
        checkpointing this code runs twice.
        """
        if later_embeds is not None:
            hidden_states = self.merge_embedding(hidden_states, later_embeds)

        x_BSD = self.input_layernorm(hidden_states)
        attention_BSD, _weights = self.self_attn(x_BSD, position_embeddings, attention_mask, past_key_values)
        hidden_states = hidden_states + attention_BSD

        x_BSD = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, DeepseekV3MoE):
            y_BSD, logits_TE, index_TK = self.mlp(x_BSD)
        else:
            y_BSD, logits_TE, index_TK = self.mlp(x_BSD), None, None
        hidden_states = hidden_states + y_BSD

        if self.is_mtp_module:
            hidden_states = self.shared_head["norm"](hidden_states)
        return (hidden_states, logits_TE, index_TK) if output_routing else hidden_states

    def merge_embedding(self, hidden_BSD: Tensor, later_embeds_BSD: Tensor) -> Tensor:
        """Return h'^k of equation 21: M_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h^{k-1})].

        The report writes the halves in the other order; the released weights have the embedding first.
        """
        return self.eh_proj(torch.cat([self.enorm(later_embeds_BSD), self.hnorm(hidden_BSD)], dim=-1))


# ---------------------------------------------------------------------------------------- trunk


class DeepseekV3PreTrainedModel(PreTrainedModel):
    """What transformers needs to initialize, cast, checkpoint and record the model."""

    config: DeepseekV3Config
    config_class = DeepseekV3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # a Trainer gives `num_items_in_batch`, the targets of all batches it accumulates
    _no_split_modules = {"DeepseekV3DecoderLayer"}  # noqa: RUF012 (transformers copies these before changing them)
    _skip_keys_device_placement = {"past_key_values"}  # noqa: RUF012
    _keep_in_fp32_modules_strict = {"e_score_correction_bias"}  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DeepseekV3DecoderLayer,
        "attentions": DeepseekV3Attention,
        "router_logits": OutputRecorder(DeepseekV3TopkRouter, index=0),
    }

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        # DeepSeek stores the embedding and the head again here. `MtpModel` finds its weights by the same patterns.
        first, depth = config.num_hidden_layers, max(1, config.num_nextn_predict_layers)
        self._keys_to_ignore_on_load_unexpected = {rf"model\.layers\.{first + k}\." for k in range(depth)}

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return the name asked for; by default the loop for widths that transformers' `grouped_mm` can't multiply."""
        size = torch.get_default_dtype().itemsize  # what the weights are made in
        row_bytes = (self.config.hidden_size * size, self.config.moe_intermediate_size * size)
        if requested_experts is None and any(length % GROUPED_MM_ALIGNMENT for length in row_bytes):
            return "eager"
        return super().get_correct_experts_implementation(requested_experts)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a model, without the MTP modules whose weights the folder lacks: stock transformers saves none."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        model.drop_missing_mtp_modules(info["missing_keys"])
        return (model, info) if output_loading_info else model

    def drop_missing_mtp_modules(self, missing: set[str]) -> None:
        """Remove the last MTP modules while all of a module's weights are `missing`, and their names from `missing`."""
        layers: Any = self.base_model.layers
        prefix = next(name for name, module in self.named_modules() if module is layers)
        stated = self.config.num_nextn_predict_layers
        while self.config.num_nextn_predict_layers:
            name = f"{prefix}.{len(layers) - 1}."
            weights = {name + key for key, _ in layers[-1].named_parameters()}
            if not weights <= set(missing):
                break
            del layers[-1]
            self.config.num_nextn_predict_layers -= 1
            missing -= {key for key in missing if key.startswith(name)}
        if self.config.num_nextn_predict_layers < stated:
            logger.warning(
                f"num_nextn_predict_layers is {stated}; the folder holds the weights of "
                f"{self.config.num_nextn_predict_layers}, so the model has as many MTP modules"
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill `module`: weights from a normal distribution of `initializer_range` (§4.2), norms one, buffers anew."""
        super()._init_weights(module)
        if isinstance(module, DeepseekV3TopkRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.e_score_correction_bias)
            init.zeros_(module.expert_load)
        elif isinstance(module, DeepseekV3Experts):
            for stack in module.parameters():
                init.normal_(stack, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, DeepseekV3RotaryEmbedding):
            init.copy_(module.inv_freq, inverse_frequencies(module.config)[0])


class DeepseekV3Model(DeepseekV3PreTrainedModel):
    """The trunk: embedding, layers, final norm. The MTP modules stand at the end of `layers`; `forward` skips them."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.layers = nn.ModuleList(DeepseekV3DecoderLayer(config, index) for index in range(num_layers))
        self.norm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DeepseekV3RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(  # noqa: PLR0913 (transformers' generation calls it by these names)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        sequence_losses: list[Tensor] | None = None,
        **_: Any,
    ) -> MoeModelOutputWithPast:
        """Return the normalized state of every position; each MoE layer appends to `sequence_losses`, if given.

        Where `position_ids` restart at 0, another document begins, which does not attend to the one before (only
        without a cache). If `use_cache` is None, the configuration decides in evaluation; training has no cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        context = self.attention_context(hidden_BSD, attention_mask, position_ids, past_key_values)
        for layer in list(self.layers)[: self.config.num_hidden_layers]:
            hidden_BSD, logits_TE, index_TK = layer(hidden_BSD, output_routing=True, **context)
            count_routing(layer, logits_TE, index_TK, hidden_BSD.shape[0], sequence_losses)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_BSD), past_key_values=past_key_values)

    def mtp_hidden_states(
        self,
        hidden_BSD: Tensor,
        embeds_BSD: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        sequence_losses: list[Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Yield, for depth k = 1, 2 …, the states from which token t_{i+k+1} is read, (B, S − k, D): equations 21, 22.

        Depth 1 starts from the trunk's state *after* the final norm, depth k from depth k−1's after `shared_head.norm`,
        as transformers and vLLM draft. Position i attends to the states up to i and the tokens up to i + k. The last k
        positions, for which there is no token i + k, are left out.
        """
        for depth, layer in enumerate(list(self.layers)[self.config.num_hidden_layers :], start=1):
            hidden_BSD, later_embeds = hidden_BSD[:, :-1], embeds_BSD[:, depth:]
            mask = mtp_mask(attention_mask, depth) if attention_mask is not None else None
            positions = position_ids[:, :-depth] if position_ids is not None else None
            context = self.attention_context(later_embeds, mask, positions)
            hidden_BSD, logits_TE, index_TK = layer(hidden_BSD, later_embeds, output_routing=True, **context)
            count_routing(layer, logits_TE, index_TK, hidden_BSD.shape[0], sequence_losses)
            yield hidden_BSD

    def attention_context(
        self, embeds_BSD: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None = None
    ) -> dict[str, Any]:
        """Return the keyword arguments of every layer: causal mask, position embeddings, cache."""
        causal_mask = create_causal_mask(self.config, embeds_BSD, mask, cache, position_ids)
        if position_ids is None:
            num_cached = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(embeds_BSD.shape[1], device=embeds_BSD.device)[None] + num_cached
        cos_sin = self.rotary_emb(embeds_BSD, position_ids)
        return {"attention_mask": causal_mask, "position_embeddings": cos_sin, "past_key_values": cache}


def mtp_mask(mask: Tensor, depth: int) -> Tensor:
    """Return the mask of depth k: positions i and j are both as they were, and as i + k and j + k were.

    `mask` is (B, S), or (B, 1, S, S) and boolean or added to the scores; the smaller value is the one that hides.
    """
    if mask.ndim == 2:
        return torch.minimum(mask[:, :-depth], mask[:, depth:])
    return torch.minimum(mask[..., :-depth, :-depth], mask[..., depth:, depth:])


def count_routing(
    layer: nn.Module, logits_TE: Tensor | None, index_TK: Tensor | None, num_sequences: int, losses: list[Tensor] | None
) -> None:
    """Count a layer's routing in its router, and append its sequence-wise loss to `losses`, if given.

    It is called outside of the layer, because activation checkpointing runs the layer twice.
    """
    if logits_TE is None or index_TK is None or not isinstance(layer.mlp, DeepseekV3MoE):
        return
    layer.mlp.router.count(index_TK)
    if losses is not None:
        losses.append(sequence_balance_loss(logits_TE, layer.mlp.router.config, num_sequences))


# ---------------------------------------------------------------------------------------- language model


@dataclass
class DeepseekV3CausalLMOutput(MoeCausalLMOutputWithPast):
    """What the language model returns. A loss that was not asked for is None and was not computed.

    loss = cross_entropy_loss + mtp_loss_weight · mtp_loss + sequence_loss_weight · sequence_loss
    """

    cross_entropy_loss: Tensor | None = None  # nats per token
    mtp_loss: Tensor | None = None  # nats per token, the mean over depths (equation 25 without λ)
    sequence_loss: Tensor | None = None  # summed over MoE layers, MTP modules too; 1 each at perfect balance


def mtp_targets(targets_BS: Tensor, position_ids: Tensor | None, depth: int) -> Tensor:
    """Return the targets of depth k, (B, S − k); ignored are those for which token t_{i+k} is in another document."""
    if position_ids is None:
        return targets_BS[:, depth:]
    is_other_BS = position_ids[:, depth:] - position_ids[:, :-depth] != depth
    return targets_BS[:, depth:].masked_fill(is_other_BS, IGNORED_LABEL)


def cross_entropy(hidden_TD: Tensor, head_weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Return the mean negative log-likelihood, in nats, of the labels that aren't ignored; 0 if all are."""
    return mean_nll(F.linear(hidden_TD, head_weight_VD), labels_T)


def mean_nll(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Return the same from logits."""
    total = F.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (labels_T != IGNORED_LABEL).sum().clamp(min=1)


def share_of_batch(loss: Tensor, targets_BS: Tensor, num_items: int | Tensor | None) -> Tensor:
    """Return a mean over targets times their share of the `num_items` targets of a batch; as it is if this is None."""
    if num_items is None:
        return loss
    return loss * (targets_BS != IGNORED_LABEL).sum() / torch.as_tensor(num_items, device=loss.device)


class DeepseekV3ForCausalLM(DeepseekV3PreTrainedModel, GenerationMixin):
    """The trunk with its head. `cross_entropy` may be replaced by any function of the same signature and value."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        self.model = DeepseekV3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = cross_entropy
        self.post_init()
        # Each rank counts its own tokens: DistributedDataParallel must not overwrite them by rank 0's.
        counts = [name for name, _ in self.named_buffers() if name.endswith("expert_load")]
        self._ddp_params_and_buffers_to_ignore = counts

    @can_return_tuple
    def forward(  # noqa: PLR0913 (transformers' generation and trainers call it by these names)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mtp_loss_weight: float = 0.0,
        sequence_loss_weight: float = 0.0,
        **kwargs: Any,
    ) -> DeepseekV3CausalLMOutput:
        """Return the losses for `labels` (aligned with `input_ids`; −100 is ignored); in training, no logits then.

        Two more keywords mean what they mean in transformers. `shift_labels` wins over `labels`: there the target of
        position i stands at position i. `num_items_in_batch` is the number of targets in a batch of which this call
        sees a part: each loss is then this call's share of the batch's. Losses of weight zero are not computed, nor is
        the MTP loss of a model without MTP modules. Padded positions count in the expert load and the sequence-wise
        loss: pack training data instead.
        """
        targets_BS, num_items = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
        if targets_BS is None and labels is not None:
            targets_BS = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        has_targets = targets_BS is not None
        has_mtp = has_targets and mtp_loss_weight != 0 and self.config.num_nextn_predict_layers > 0
        sequence_losses: list[Tensor] | None = [] if has_targets and sequence_loss_weight != 0 else None
        if has_mtp and input_ids is not None:  # the MTP modules read the embeddings too
            input_ids, inputs_embeds = None, self.model.embed_tokens(input_ids)

        trunk = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if has_targets and use_cache is None else use_cache,
            sequence_losses=sequence_losses,
            return_dict=True,
            **kwargs,
        )
        hidden_BSD = trunk.last_hidden_state
        logits = cross_entropy_loss = mtp_loss = sequence_loss = loss = None
        if not has_targets or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_BSD[:, kept])
        if targets_BS is not None:
            loss = cross_entropy_loss = self.head_loss(hidden_BSD, targets_BS, num_items)
            if has_mtp and inputs_embeds is not None:
                states = self.model.mtp_hidden_states(
                    hidden_BSD, inputs_embeds, attention_mask, position_ids, sequence_losses
                )
                mtp_loss = self.mtp_loss(states, targets_BS, position_ids, num_items)
                loss = loss + mtp_loss_weight * mtp_loss
            if sequence_losses:
                sequence_loss = share_of_batch(torch.stack(sequence_losses).sum(), targets_BS, num_items)
                loss = loss + sequence_loss_weight * sequence_loss
        return DeepseekV3CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=trunk.past_key_values,
            hidden_states=trunk.hidden_states,
            attentions=trunk.attentions,
            router_logits=trunk.router_logits,
            cross_entropy_loss=cross_entropy_loss,
            mtp_loss=mtp_loss,
            sequence_loss=sequence_loss,
        )

    def head_loss(self, hidden_BSD: Tensor, targets_BS: Tensor, num_items: int | Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy of the targets, by the replaceable function `cross_entropy`."""
        hidden_TD, targets_T = hidden_BSD.flatten(0, 1), targets_BS.flatten()
        if is_plain_linear(self.lm_head):
            loss = self.cross_entropy(hidden_TD, self.lm_head.weight, targets_T)
        else:
            loss = mean_nll(self.lm_head(hidden_TD), targets_T)
        return share_of_batch(loss, targets_BS, num_items)

    def mtp_loss(
        self,
        states: Iterable[Tensor],
        targets_BS: Tensor,
        position_ids: Tensor | None,
        num_items: int | Tensor | None,
    ) -> Tensor:
        """Return the mean over the depths of their cross-entropy: equation 25 without λ."""
        losses = [
            self.head_loss(state_BSD, mtp_targets(targets_BS, position_ids, depth), num_items)
            for depth, state_BSD in enumerate(states, start=1)
        ]
        return torch.stack(losses).mean()

    def routers(self) -> list[tuple[int, DeepseekV3TopkRouter]]:
        """Return every router with the number of its layer; MTP modules have the numbers after the trunk's."""
        mlps = [(index, layer.mlp) for index, layer in enumerate(self.model.layers)]
        return [(index, mlp.router) for index, mlp in mlps if isinstance(mlp, DeepseekV3MoE)]

    def set_count_expert_load(self, enabled: bool) -> None:
        """Let the routers count tokens in evaluation too, or not; in training they always do."""
        for _, router in self.routers():
            router.counts_when_evaluating = enabled

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write the model as DeepSeek does: with a copy of embedding and head under each MTP module."""
        state = dict(kwargs.pop("state_dict", None) or self.state_dict())
        first = self.config.num_hidden_layers
        for index in range(first, first + self.config.num_nextn_predict_layers):
            state[f"model.layers.{index}.embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
            state[f"model.layers.{index}.shared_head.head.weight"] = state["lm_head.weight"].clone()
        super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)


DeepseekV3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# Without this, transformers converts between stacked and separate experts for its own class only.
register_checkpoint_conversion_mapping(
    DeepseekV3Config.model_type, get_checkpoint_conversion_mapping(DeepseekV3Config.model_type) or [], overwrite=True
)

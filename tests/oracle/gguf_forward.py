"""A language model from a GGUF file and nothing else, in numpy and float64: what llama.cpp's `deepseek2` computes.

Written from llama.cpp 0c1e57098 (src/models/deepseek2.cpp, src/llama-graph.cpp, ggml's rope), not from this project's
model: absorbed attention with one key per position, `attn_k_b` on the queries and `attn_v_b` on the output.

Letters: S positions, X keys, D hidden_size, H num_attention_heads, P qk_rope_head_dim, C kv_lora_rank,
E n_routed_experts
"""

import math

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

PREFIX = "deepseek2."


class GGUFModel:
    def __init__(self, path):
        reader = GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.stored = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        self.tensors = {name: tensor.astype(np.float64) for name, tensor in self.stored.items()}

    def get(self, name, default=None):
        return self.fields.get(PREFIX + name, default)

    def logits(self, ids):
        x_SD = self.tensors["token_embd.weight"][ids]
        for layer in range(self.get("block_count")):
            weights = LayerWeights(self.tensors, layer)
            x_SD = x_SD + self.attention(weights, self.rms(x_SD, weights["attn_norm.weight"]))
            normed = self.rms(x_SD, weights["ffn_norm.weight"])
            is_dense = layer < self.get("leading_dense_block_count", 0)
            x_SD = x_SD + (swiglu(weights, normed, "") if is_dense else self.experts(weights, normed))
        output = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return self.rms(x_SD, self.tensors["output_norm.weight"]) @ output.T

    def rms(self, x, weight):
        epsilon = self.get("attention.layer_norm_rms_epsilon")
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * weight

    def attention(self, weights, h_SD):
        heads, latent_width = self.get("attention.head_count"), self.get("attention.kv_lora_rank")
        rotated_width, key_width = self.get("rope.dimension_count"), self.get("attention.key_length_mla")
        assert self.get("attention.head_count_kv") == 1
        assert self.get("attention.key_length") == latent_width + rotated_width
        assert self.get("attention.value_length") == latent_width
        if self.get("attention.q_lora_rank"):
            compressed = self.rms(h_SD @ weights["attn_q_a.weight"].T, weights["attn_q_a_norm.weight"])
            query = (compressed @ weights["attn_q_b.weight"].T).reshape(len(h_SD), heads, key_width)
        else:
            query = (h_SD @ weights["attn_q.weight"].T).reshape(len(h_SD), heads, key_width)
        q_nope, q_rope = np.split(query, [key_width - rotated_width], axis=-1)
        down = h_SD @ weights["attn_kv_a_mqa.weight"].T
        latent, k_rope = np.split(down, [latent_width], axis=-1)
        latent_SC = self.rms(latent, weights["attn_kv_a_norm.weight"])
        q_rope, k_rope = self.rotate(q_rope), self.rotate(k_rope[:, None])[:, 0]
        query = np.concatenate([np.einsum("shn,hcn->shc", q_nope, weights["attn_k_b.weight"]), q_rope], axis=-1)
        key = np.concatenate([latent_SC, k_rope], axis=-1)
        scores_HSX = np.einsum("shk,xk->hsx", query, key) * self.score_scale()
        scores_HSX = np.where(np.tri(len(h_SD), dtype=bool), scores_HSX, -np.inf)
        weights_HSX = np.exp(scores_HSX - scores_HSX.max(axis=-1, keepdims=True))
        weights_HSX /= weights_HSX.sum(axis=-1, keepdims=True)
        seen = np.einsum("hsx,xc->shc", weights_HSX, latent_SC)
        value = np.einsum("shc,huc->shu", seen, weights["attn_v_b.weight"])
        assert value.shape[2] == self.get("attention.value_length_mla")
        return value.reshape(len(h_SD), -1) @ weights["attn_output.weight"].T

    def yarn(self):
        """The logarithm of YaRN's factor (0 without YaRN), llama.cpp's attention factor, and m, its log multiplier."""
        if self.get("rope.scaling.type") != "yarn":
            return 0.0, 1.0, 0.0
        log = math.log(self.get("rope.scaling.factor"))
        multiplier = self.get("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
        # With a multiplier it takes mscale for equal to mscale_all_dim (or for 1), so their ratio is 1.
        factor = (1.0 if multiplier else 1.0 + 0.1 * log) / (1.0 + 0.1 * log)
        return log, factor * self.get("rope.scaling.attn_factor", 1.0), multiplier

    def score_scale(self):
        log, factor, multiplier = self.yarn()
        mscale = factor * (1.0 + 0.1 * log) * (1.0 + 0.1 * multiplier * log)
        return mscale**2 / math.sqrt(self.get("attention.key_length_mla"))

    def rotate(self, x_SHP):
        """Return `x` with each adjacent pair of dimensions rotated by its position's angle."""
        width, base = x_SHP.shape[-1], self.get("rope.freq_base")
        log, factor, _ = self.yarn()
        frequency = base ** (-np.arange(0, width, 2) / width)
        if log:
            original = self.get("rope.scaling.original_context_length")
            low, high = (width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
            low, high = max(0, math.floor(low)), min(width - 1, math.ceil(high))
            extrapolated = 1 - np.clip((np.arange(width // 2) - low) / max(0.001, high - low), 0, 1)
            frequency *= math.exp(-log) * (1 - extrapolated) + extrapolated
        angles = np.arange(len(x_SHP))[:, None, None] * frequency
        pairs = (x_SHP[..., 0::2] + 1j * x_SHP[..., 1::2]) * np.exp(1j * angles) * factor * (1.0 + 0.1 * log)
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x_SHP.shape)

    def experts(self, weights, h_SD):
        assert self.get("expert_gating_func") == 2
        out_SD = swiglu(weights, h_SD, "_shexp")
        affinity_SE = 1 / (1 + np.exp(-h_SD @ weights["ffn_gate_inp.weight"].T))
        selection_SE = affinity_SE + weights["exp_probs_b.bias"]
        if self.get("expert_group_count", 0) > 1:
            grouped = selection_SE.reshape(len(h_SD), self.get("expert_group_count"), -1)
            order = np.argsort(-np.sort(grouped)[..., -2:].sum(axis=-1))[:, : self.get("expert_group_used_count")]
            kept = np.zeros(grouped.shape[:2], bool)
            np.put_along_axis(kept, order, True, axis=1)
            selection_SE = np.where(kept[..., None], grouped, -np.inf).reshape(selection_SE.shape)
        for position, (h, affinity) in enumerate(zip(h_SD, affinity_SE, strict=True)):
            chosen = np.argsort(-selection_SE[position])[: self.get("expert_used_count")]
            gates = affinity[chosen]
            if self.get("expert_weights_norm", False):
                gates = gates / gates.sum()
            for expert, gate in zip(chosen, gates * self.get("expert_weights_scale"), strict=True):
                out_SD[position] += gate * swiglu(weights, h, "_exps", expert)
        return out_SD


class LayerWeights:
    def __init__(self, tensors, layer):
        self.tensors, self.layer = tensors, layer

    def __getitem__(self, name):
        return self.tensors[f"blk.{self.layer}.{name}"]


def swiglu(weights, h, suffix, expert=...):
    gate, up, down = (weights[f"ffn_{name}{suffix}.weight"][expert] for name in ("gate", "up", "down"))
    gated = h @ gate.T
    return (gated / (1 + np.exp(-gated)) * (h @ up.T)) @ down.T

"""One text, a token at a time, on a CPU: the model's own arithmetic without what a general library does around it.

A small model's token is a few hundred small operations, each shorter than what transformers' `generate` and a module's
call cost beside it. Here the weights are laid out once for reading single tokens, and a layer is some thirty calls:

- the query's and the latent's projections are one product (without query compression), the softmax's scale is in the
  query's weights, and the two dimensions of a pair that RoPE rotates come out side by side: a complex number;
- attention takes its absorbed form always (`DeepseekV3Attention`): latents and rotary keys of all positions lie side by
  side in one buffer, so scores are one product with it and the output one with a part of it;
- an expert is read where it lies in its stack, and adds to the residual stream by itself.

Routing is the model's own, so a router variant needs nothing here. What we give up: a second place that knows the
layer, held to the first by tests over every form that it takes; and all that `generate` offers beyond these texts. A
model that it does not take (`is_decodable`: another device or precision, an adapter, hooks, RoPE that depends on the
length) is left to transformers.

Letters: S positions, X keys, D hidden_size, H num_attention_heads, N qk_nope_head_dim, P qk_rope_head_dim,
U v_head_dim, C kv_lora_rank, K num_experts_per_tok, F intermediate_size, V vocab_size, W columns
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

PLAIN = {
    "Linear", "Embedding", "ModuleList", "ModuleDict", "SiLUActivation", "SiLU", "DeepseekV3ForCausalLM",
    "DeepseekV3Model", "DeepseekV3DecoderLayer", "DeepseekV3Attention", "DeepseekV3MLP", "DeepseekV3MoE",
    "DeepseekV3TopkRouter", "DeepseekV3Experts", "DeepseekV3RMSNorm", "DeepseekV3RotaryEmbedding",
}  # fmt: skip
"""Classes whose arithmetic is written out here."""
CHUNK = 64
"""Tokens of a prompt that are read at once, which bounds the scores' memory."""
FEW = 4
"""Most tokens whose experts are read one by one."""
BYTES_PER_THREAD = 2**24
"""Weights per thread. Threads that read less wait for each other longer than they read, on a busy machine much more."""


def is_decodable(model: PreTrainedModel) -> bool:
    """Return whether `Decoder` computes what `model` does: fp32 on a CPU, nothing replaced, wrapped or hooked."""
    rope = model.config.rope_parameters or {}
    is_fp32 = all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in model.parameters())
    return is_fp32 and rope.get("rope_type") != "dynamic" and not model.training and all(map(is_plain, model.modules()))


def is_plain(module: nn.Module) -> bool:
    """Return whether the module is of a class that is written out here, with no hook and no `forward` of its own."""
    is_hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return type(module).__name__ in PLAIN and not is_hooked


@contextmanager
def threads_for(model: PreTrainedModel) -> Iterator[None]:
    """Let torch use as many of its threads as single tokens of `model` are worth; all of them again after the block."""
    before = torch.get_num_threads()
    num_bytes = sum(weight.nbytes for weight in model.parameters())
    torch.set_num_threads(max(1, min(before, num_bytes // BYTES_PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Decoder:
    """The trunk of one model with the latents of one text."""

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        trunk: Any = model.model
        self._embedding: Tensor = trunk.embed_tokens.weight
        self._head: Tensor = model.lm_head.weight
        self._norm = Norm(trunk.norm)
        cos_sin = trunk.rotary_emb(self._embedding, torch.arange(max_length)[None])
        depth = model.config.num_hidden_layers
        self._layers = [Layer(layer, model.config, cos_sin) for layer in list(trunk.layers)[:depth]]
        self.modules = [Module(layer, model.config, cos_sin) for layer in list(trunk.layers)[depth:]]
        """The multi-token prediction modules."""
        self.length = 0
        """Tokens that were read. A smaller number forgets those from there on."""

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Read further tokens; return the normalized state of each, (S, D)."""
        chunks = [tokens[first : first + CHUNK] for first in range(0, len(tokens), CHUNK)]
        return torch.cat([self._read_chunk(torch.tensor(chunk)) for chunk in chunks])

    def _read_chunk(self, ids_S: Tensor) -> Tensor:
        state_SD = self.embed(ids_S)
        for layer in self._layers:
            state_SD = layer(state_SD, self.length)
        self.length += len(ids_S)
        return self._norm(state_SD)

    def embed(self, ids_S: Tensor) -> Tensor:
        """Return the tokens' embeddings, (S, D)."""
        return F.embedding(ids_S, self._embedding)

    def logits(self, state_SD: Tensor) -> Tensor:
        """Return the logits of states, (S, V)."""
        return F.linear(state_SD, self._head)


class Norm:
    """RMSNorm. torch's takes seven operations on a CPU; for one token, three do."""

    def __init__(self, norm: Any) -> None:
        self.norm, self.weight, self.eps = norm, norm.weight, norm.eps

    def __call__(self, x_SD: Tensor) -> Tensor:
        """Return the normalized rows."""
        if len(x_SD) > 1:
            return self.norm(x_SD)
        mean_square = float(torch.dot(x_SD[0], x_SD[0])) / x_SD.shape[1]
        return x_SD * self.weight * (mean_square + self.eps) ** -0.5


class Layer:
    """A decoder layer that reads a few tokens and keeps their latents."""

    def __init__(self, layer: Any, config: Any, cos_sin: tuple[Tensor, Tensor]) -> None:
        attention = layer.self_attn
        self.heads, self.latent_width = attention.num_heads, config.kv_lora_rank
        self.norm, self.latent_norm = Norm(layer.input_layernorm), Norm(attention.kv_a_layernorm)
        self.mlp_norm = Norm(layer.post_attention_layernorm)
        self.cis_X1P = torch.complex(*cos_sin).transpose(0, 1)
        self.cache_XW = torch.empty(len(self.cis_X1P), config.kv_lora_rank + config.qk_rope_head_dim)
        """Normalized latents and rotated keys of all positions, side by side."""
        self.project = projections(attention, config)
        widths = [config.qk_nope_head_dim, config.v_head_dim]
        w_uk_HNC, w_uv_HUC = attention.kv_b_proj.weight.unflatten(0, (self.heads, -1)).split(widths, dim=1)
        self.w_uk_HNC, self.w_uv_HCU = w_uk_HNC.contiguous(), w_uv_HUC.mT.contiguous()
        self.w_o, self.b_o = attention.o_proj.weight.T, attention.o_proj.bias
        self.moe = layer.mlp if hasattr(layer.mlp, "experts") else None
        self.mlp = SwiGlu(layer.mlp if self.moe is None else self.moe.shared_experts)

    def __call__(self, state_SD: Tensor, start: int) -> Tensor:
        """Return the layer's output for the tokens from position `start` on, whose latents are kept."""
        state_SD = self.attend(state_SD, start)
        x_SD = self.mlp_norm(state_SD)
        if self.moe is not None:
            state_SD = self.add_experts(state_SD, x_SD)
        return self.mlp.add(state_SD, x_SD)

    def attend(self, state_SD: Tensor, start: int) -> Tensor:
        """Return the state plus the attention's output, by latents alone: equations 1, 3 and 6 to 11, absorbed."""
        num, heads, width = len(state_SD), self.heads, self.latent_width
        end = start + num
        q_nope, q_rope, latent_SC, k_rope = self.project(self.norm(state_SD))
        pairs = torch.cat([q_rope, k_rope], dim=1).view(num, heads + 1, -1, 2)  # the shared key as one more head
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * self.cis_X1P[start:end]).flatten(2)
        torch.cat([self.latent_norm(latent_SC), rotated[:, heads]], dim=1, out=self.cache_XW[start:end])

        q_latent_HSC = q_nope.view(num, heads, -1).transpose(0, 1) @ self.w_uk_HNC
        query_SHW = torch.cat([q_latent_HSC.transpose(0, 1), rotated[:, :heads]], dim=-1)
        keys_XW = self.cache_XW[:end]
        scores_SHX = (query_SHW.flatten(0, 1) @ keys_XW.T).view(num, heads, end)
        if num > 1:
            is_later_SX = torch.arange(end) > torch.arange(start, end)[:, None]
            scores_SHX = scores_SHX.masked_fill(is_later_SX[:, None], -torch.inf)
        out_SHC = (scores_SHX.softmax(dim=-1).flatten(0, 1) @ keys_XW[:, :width]).view(num, heads, -1)
        out_SHU = (out_SHC.transpose(0, 1) @ self.w_uv_HCU).transpose(0, 1)
        state_SD = torch.addmm(state_SD, out_SHU.flatten(1), self.w_o)
        return state_SD if self.b_o is None else state_SD + self.b_o

    def add_experts(self, state_SD: Tensor, x_SD: Tensor) -> Tensor:
        """Return the state plus the outputs of each token's routed experts: equation 12."""
        moe: Any = self.moe
        _logits, gates_SK, index_SK = moe.gate(x_SD)
        if len(x_SD) > FEW:
            return state_SD + moe.experts(x_SD, index_SK, gates_SK)
        gate_up, down, rows = moe.experts.gate_up_proj, moe.experts.down_proj, list[Tensor]()
        tokens = zip(state_SD.split(1), x_SD.split(1), gates_SK.tolist(), index_SK.tolist(), strict=True)
        for state_1D, x_1D, gates, chosen in tokens:
            for gate, expert in zip(gates, chosen, strict=True):
                gate_1F, up_1F = F.linear(x_1D, gate_up[expert]).chunk(2, dim=1)
                state_1D = torch.addmm(state_1D, F.silu(gate_1F) * up_1F, down[expert].T, alpha=gate)
            rows.append(state_1D)
        return torch.cat(rows)


class SwiGlu:
    """A dense layer's network, or the shared experts; None is added where there are none."""

    def __init__(self, mlp: Any) -> None:
        self.weights = None if mlp is None else (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T)

    def add(self, state_SD: Tensor, x_SD: Tensor) -> Tensor:
        """Return the state plus the network's output."""
        if self.weights is None:
            return state_SD
        gate, up, down = self.weights
        return torch.addmm(state_SD, F.silu(F.linear(x_SD, gate)) * F.linear(x_SD, up), down)


Projection = Callable[[Tensor], tuple[Tensor, ...]]


def projections(attention: Any, config: Any) -> Projection:
    """Return the function from normalized states (S, D) to q^C, q^R, c^KV before its norm, and k^R.

    Queries come out scaled; rotary dimensions come out unrotated, those of a pair side by side.
    """
    heads, nope, rope = attention.num_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    latent = config.kv_lora_rank
    order = torch.arange(rope) if config.rope_interleave else torch.arange(rope).view(2, -1).T.flatten()
    is_compressed = config.q_lora_rank is not None
    query = attention.q_b_proj if is_compressed else attention.q_proj
    q_nope, q_rope = query.weight.unflatten(0, (heads, -1)).split([nope, rope], dim=1)
    w_q = torch.cat([q_nope.flatten(0, 1), q_rope[:, order].flatten(0, 1)]) * attention.scaling
    down = attention.kv_a_proj_with_mqa
    rows = torch.cat([torch.arange(latent), latent + order])
    w_kv, b_kv = down.weight[rows], None if down.bias is None else down.bias[rows]
    q_widths, kv_widths = [heads * nope, heads * rope], [latent, rope]
    if not is_compressed and b_kv is None:
        w_all, widths = torch.cat([w_q, w_kv]), q_widths + kv_widths
        return lambda x_SD: F.linear(x_SD, w_all).split(widths, dim=1)

    def project(x_SD: Tensor) -> tuple[Tensor, ...]:
        q_SD = attention.q_a_layernorm(attention.q_a_proj(x_SD)) if is_compressed else x_SD
        q, kv = F.linear(q_SD, w_q), F.linear(x_SD, w_kv, b_kv)
        return *q.split(q_widths, dim=1), *kv.split(kv_widths, dim=1)

    return project


class Module(Layer):
    """A multi-token prediction module with the latents of its own positions."""

    def __init__(self, layer: Any, config: Any, cos_sin: tuple[Tensor, Tensor]) -> None:
        super().__init__(layer, config, cos_sin)
        self.module = layer

    def read(self, state_SD: Tensor, later_SD: Tensor, start: int) -> Tensor:
        """Return the module's states of positions from `start` on, (S, D), from states and later embeddings."""
        return self.module.shared_head["norm"](self(self.module.merge_embedding(state_SD, later_SD), start))

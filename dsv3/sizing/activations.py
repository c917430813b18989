"""What a forward pass keeps for the backward pass, in bytes, counted tensor by tensor.

Every operation keeps what its derivative needs: a linear layer its input, SwiGLU its gate and up and two products of
them, RMSNorm its input, attention its queries, keys, values and (without a fused kernel) a whole square of weights per
head. A tensor that several operations keep counts once. The terms below name these tensors in the order in which a
layer makes them; tests compare their sum with the storages that autograd really keeps.

Three things decide the terms besides the sizes:

- the *precision*: under autocast every linear layer keeps its own bf16 copy of its input, while the residual stream,
  the norms and the router stay in fp32;
- the *device*: on CUDA, attention and RMSNorm are fused kernels, which keep neither the square nor the normalized
  input;
- the *expert backend*: how much of a token's way through its experts is kept and how much is computed again.
"""

from dataclasses import dataclass, replace
from typing import Literal

from dsv3.params.architecture import Architecture
from dsv3.params.expert_backends import BACKENDS, ExpertBackend
from dsv3.params.runtime import Device
from dsv3.sizing.causal_attention import BLOCK_QUERIES, is_attention_blocked, num_kept_weights
from dsv3.sizing.chunked_loss import CHUNK_BYTES, is_loss_chunked
from dsv3.sizing.parameters import attention_weights, expert_weights

FP32, BF16, INT64 = 4, 2, 8
"""Bytes per number."""

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class Workload:
    """One forward pass of a training: its tokens, and by which arithmetic it runs."""

    num_sequences: int
    sequence_tokens: int
    device: Device
    precision: Literal["fp32", "bf16"]
    """fp32 (emulations included), or bf16 under autocast with fp32 master weights."""
    experts: str
    """Name of the expert backend."""
    gradient_checkpointing: bool = False
    swiglu_cache: bool = False
    """With an FP8 backend: the input of its SwiGLU is kept in e4m3, with an fp32 scale per 128 numbers."""
    mx_blocks: bool = False
    """MXFP8: forward and dgrad see different numbers of a weight."""
    drops_hidden: bool = False
    """What each half of a layer adds passes dropout."""
    cross_document_attention: bool = True
    """No mask hides one document from another."""
    has_teachers: bool = False
    """Other models' probabilities of every token are there, and logits are never chunked."""

    @property
    def num_tokens(self) -> int:
        """Tokens in one forward pass."""
        return self.num_sequences * self.sequence_tokens

    @property
    def backend(self) -> ExpertBackend:
        """The expert backend."""
        return BACKENDS[self.experts]

    @property
    def compute_bytes(self) -> int:
        """Bytes per number of what linear layers multiply."""
        return DTYPE_BYTES[self.precision]

    @property
    def has_bf16_linears(self) -> bool:
        """Whether linear layers multiply bf16 copies of their operands; FP8 ones quantize the fp32 tensors."""
        return self.precision == "bf16" and not self.backend.is_fp8

    def linear_inputs(self, width: int, num_linears: int) -> int:
        """Return the bytes per token of the inputs that `num_linears` layers keep of one fp32 tensor."""
        return BF16 * width * num_linears if self.has_bf16_linears else FP32 * width

    def norm(self, width: int) -> int:
        """Return the bytes per token that an RMSNorm keeps: input, 1 / rms and, where it is not fused, input / rms."""
        return FP32 * ((1 if self.device == "cuda" else 2) * width + 1)


def dropout_bytes(a: Architecture, w: Workload, layer: int) -> int:
    """Return the bytes per token of a layer's two dropout masks: of booleans on CUDA, of factors on a CPU.

    Routed experts are added up in fp32.
    """
    if not w.drops_hidden:
        return 0
    routed = FP32 if a.is_moe(layer) else w.compute_bytes
    return a.hidden_size * (2 if w.device == "cuda" else w.compute_bytes + routed)


def query_bytes(a: Architecture, w: Workload) -> int:
    """Return the bytes per token that the query bottleneck keeps, without the input of the layer."""
    if a.q_lora_rank is None:
        return 0
    return w.norm(a.q_lora_rank) + w.linear_inputs(a.q_lora_rank, num_linears=1)


def latent_bytes(a: Architecture, w: Workload) -> int:
    """Return the bytes per token of the latent before and after its norm; in fp32 it is a part of a wider tensor."""
    beside = FP32 * a.qk_rope_head_dim if w.precision == "fp32" else 0
    return w.norm(a.kv_lora_rank) + beside + w.linear_inputs(a.kv_lora_rank, num_linears=1)


def attends_in_blocks(a: Architecture, w: Workload) -> bool:
    """Return whether attention is the project's own kernel of a CPU."""
    return w.device == "cpu" and is_attention_blocked(
        a.qk_head_dim, a.v_head_dim, a.attention_dropout, w.cross_document_attention
    )


def softmax_bytes(a: Architecture, w: Workload) -> int:
    """Return the bytes per token that attention itself keeps, its output included (which `o_proj` keeps).

    Fused: queries, keys, the projection that values are a part of, and one log-sum-exp per head. In blocks, on a CPU:
    instead of the last the weights of half the pairs of positions. Else: queries and keys scaled, values, and the
    weights of every pair of positions, all in fp32.
    """
    heads, keys = a.num_attention_heads, w.sequence_tokens
    output = w.compute_bytes * heads * a.v_head_dim
    operands = w.compute_bytes * heads * (2 * a.qk_head_dim + a.qk_nope_head_dim + a.v_head_dim)
    if w.device == "cuda":
        return operands + FP32 * heads + output
    if attends_in_blocks(a, w):
        return operands + w.compute_bytes * heads * num_kept_weights(keys, w.precision) // keys + output
    return FP32 * heads * (2 * a.qk_head_dim + a.v_head_dim + keys) + output


def attention_bytes(a: Architecture, w: Workload) -> int:
    """Return the bytes per token that a layer's first half keeps: norm, latents, attention."""
    inputs = w.linear_inputs(a.hidden_size, num_linears=2)
    return w.norm(a.hidden_size) + inputs + query_bytes(a, w) + latent_bytes(a, w) + softmax_bytes(a, w)


def mlp_bytes(width: int, w: Workload) -> int:
    """Return the bytes per token of a SwiGLU: gate, silu(gate), up, and their product; the input counts elsewhere."""
    return 4 * width * w.compute_bytes


def dense_bytes(a: Architecture, w: Workload) -> int:
    """Return the bytes per token that a dense layer's second half keeps."""
    inputs = w.linear_inputs(a.hidden_size, num_linears=2)
    return w.norm(a.hidden_size) + inputs + mlp_bytes(a.intermediate_size, w)


def router_bytes(a: Architecture, w: Workload) -> int:
    """Return the bytes per token of the router's scores (for itself and for the sequence-wise loss) and gates."""
    scores = 2 * FP32 * a.n_routed_experts + 2 * FP32
    return scores + a.num_experts_per_tok * (2 * INT64 + 2 * FP32)


def assignment_bytes(a: Architecture, w: Workload) -> int:
    """Return the bytes that the expert backend keeps of one assignment, a token and one of its experts."""
    kept = w.backend.kept
    numbers = kept.hidden_rows * a.hidden_size + kept.intermediate_rows * a.moe_intermediate_size
    indices = INT64 * kept.indices
    if not (w.swiglu_cache and w.backend.is_fp8):
        return w.compute_bytes * numbers + indices
    gate_up = 2 * a.moe_intermediate_size
    return w.compute_bytes * (numbers - gate_up) + (128 + FP32) * -(-gate_up // 128) + indices


def experts_bytes(a: Architecture, w: Workload) -> int:
    """Return the bytes per token that the routed experts keep, beside the fp32 input and the casts of their weights."""
    # A backend that keeps no row per assignment reads the tokens' own, under autocast a cast copy of them.
    keeps_cast_input = w.backend.kept.hidden_rows == 0 and w.precision == "bf16"
    cast_input = BF16 * a.hidden_size if keeps_cast_input else 0
    return cast_input + a.num_experts_per_tok * assignment_bytes(a, w)


def moe_bytes(a: Architecture, w: Workload) -> int:
    """Return the bytes per token that an MoE layer's second half keeps: norm, router, routed and shared experts."""
    shared_width = a.n_shared_experts * a.moe_intermediate_size
    shared_inputs = 2 * BF16 * a.hidden_size if shared_width and w.has_bf16_linears else 0
    shared = shared_inputs + mlp_bytes(shared_width, w)
    inputs = FP32 * a.hidden_size  # the router's, and in fp32 everybody's
    return w.norm(a.hidden_size) + inputs + router_bytes(a, w) + experts_bytes(a, w) + shared


def mtp_bytes(a: Architecture, w: Workload) -> int:
    """Return the bytes per token that an MTP module keeps on its way in and out, besides its block and its loss.

    The two norms of its way in, whose inputs others keep already (under autocast, of the state only a bf16 copy), the
    concatenated halves, and the norm on its way out.
    """
    halves = 2 * FP32 * (1 if w.device == "cuda" else a.hidden_size + 1)
    state = 0 if w.precision == "fp32" else FP32 * a.hidden_size
    concatenated = w.linear_inputs(2 * a.hidden_size, num_linears=1)
    return halves + state + concatenated + w.norm(a.hidden_size)


def layer_bytes(a: Architecture, w: Workload, layer: int) -> int:
    """Return what layer number `layer` keeps of all its tokens."""
    w = of_layer(a, w, layer)
    half = moe_bytes(a, w) if a.is_moe(layer) else dense_bytes(a, w)
    mtp = mtp_bytes(a, w) if layer >= a.num_hidden_layers else 0
    return w.num_tokens * (attention_bytes(a, w) + half + mtp + dropout_bytes(a, w, layer))


def of_layer(a: Architecture, w: Workload, layer: int) -> Workload:
    """Return the workload of layer number `layer`: an MTP module of depth d sees d fewer tokens per sequence."""
    depth = max(0, layer + 1 - a.num_hidden_layers)
    return replace(w, sequence_tokens=max(1, w.sequence_tokens - depth))


def all_layers(a: Architecture) -> range:
    """Return the numbers of all layers, those of the MTP modules included."""
    return range(a.num_hidden_layers + a.num_nextn_predict_layers)


def activation_bytes(a: Architecture, w: Workload) -> int:
    """Return what all layers keep until the backward pass reaches them, without the loss and the casts of weights.

    With gradient checkpointing a layer keeps its input only; what it computes again is `recomputed_bytes`.
    """
    layers = sum(kept_bytes(a, w, layer) for layer in all_layers(a))
    angles = 2 * FP32 * w.sequence_tokens * a.qk_rope_head_dim // 2
    return layers + angles + w.num_tokens * (w.norm(a.hidden_size) + INT64)


def kept_bytes(a: Architecture, w: Workload, layer: int) -> int:
    """Return what layer number `layer` keeps until the backward pass reaches it, without casts of weights."""
    return w.num_tokens * FP32 * a.hidden_size if w.gradient_checkpointing else layer_bytes(a, w, layer)


def recomputed_bytes(a: Architecture, w: Workload) -> int:
    """Return what exists beside the checkpoints while the largest layer is computed again and passed backward.

    The backward pass frees a layer's second half before it begins with attention, which needs more of its own: the
    larger of the two counts.
    """
    if not w.gradient_checkpointing:
        return 0
    return max(max(running_bytes(a, w, layer), attention_backward_bytes(a, w, layer)) for layer in all_layers(a))


def running_bytes(a: Architecture, w: Workload, layer: int) -> int:
    """Return what exists of layer number `layer` as its backward pass begins."""
    return layer_bytes(a, w, layer) + layer_cast_bytes(a, w, layer)


def attention_backward_bytes(a: Architecture, w: Workload, layer: int) -> int:
    """Return what of layer number `layer` exists while its backward pass is in attention.

    Where no kernel fuses attention, the gradients of its weights and of its scores are a square each, or of a block of
    its rows.
    """
    w = of_layer(a, w, layer)
    if w.device == "cuda":
        per_row = 0
    elif attends_in_blocks(a, w):
        per_row = w.compute_bytes * min(BLOCK_QUERIES[w.precision], w.sequence_tokens)
    else:
        per_row = FP32 * w.sequence_tokens
    gradients = 2 * a.num_attention_heads * per_row
    mtp = mtp_bytes(a, w) if layer >= a.num_hidden_layers else 0
    return w.num_tokens * (attention_bytes(a, w) + gradients + mtp)


def expert_cast_bytes(a: Architecture, w: Workload, layer: int) -> int:
    """Return the bf16 copies of one layer's routed experts, which its backward pass needs."""
    return BF16 * a.n_routed_experts * expert_weights(a) if w.has_bf16_linears and a.is_moe(layer) else 0


def linear_weights(a: Architecture, layer: int) -> int:
    """Return the weights in the linear layers of layer number `layer`, routed experts left out."""
    mlp = a.n_shared_experts * expert_weights(a) if a.is_moe(layer) else 3 * a.hidden_size * a.intermediate_size
    projection = 2 * a.hidden_size**2 if layer >= a.num_hidden_layers else 0
    return attention_weights(a) + mlp + projection


def layer_cast_bytes(a: Architecture, w: Workload, layer: int) -> int:
    """Return the bf16 copies of one layer's weights: autocast's of its linear layers, the backend's of its experts."""
    linears = BF16 * linear_weights(a, layer) if w.has_bf16_linears else 0
    return linears + expert_cast_bytes(a, w, layer)


def weight_cast_bytes(a: Architecture, w: Workload) -> int:
    """Return the bf16 copies of weights that live until the backward pass: the head's, and those of all layers.

    With gradient checkpointing a layer's exist while it is computed only (see `recomputed_bytes`): autocast's cache is
    then off (`dsv3.training.setup`).
    """
    layers = 0 if w.gradient_checkpointing else sum(layer_cast_bytes(a, w, layer) for layer in all_layers(a))
    return head_cast_bytes(a, w) + layers


def head_cast_bytes(a: Architecture, w: Workload) -> int:
    """Return the bf16 copy of the output head."""
    return BF16 * a.vocab_size * a.hidden_size if w.precision == "bf16" else 0


def derived_weight_bytes(a: Architecture, w: Workload) -> int:
    """Return the quantized or rounded copies of weights, which all passes of an optimizer step share and none outlives.

    FP8 keeps each weight twice, as it is and transposed, with a scale per 128x128 block each; an emulation keeps it
    in fp32, once or for either pass.
    """
    return sum(layer_derived_bytes(a, w, layer) for layer in all_layers(a))


def layer_derived_bytes(a: Architecture, w: Workload, layer: int) -> int:
    """Return the quantized or rounded copies of one layer's weights."""
    weights = linear_weights(a, layer) + (a.n_routed_experts * expert_weights(a) if a.is_moe(layer) else 0)
    if w.backend.is_emulated:
        return FP32 * weights * (2 if w.mx_blocks else 1)
    return 2 * (weights + FP32 * weights // (128 * 128)) if w.backend.is_fp8 else 0


def logits_bytes(a: Architecture, w: Workload) -> int:
    """Return what the output head and the losses need at the beginning of the backward pass.

    Every head (the main one and one per MTP module) keeps its input and its log-softmax in fp32; the one whose backward
    pass begins holds the gradients of the log-softmax and of the logits as well. Large logits are never whole: a chunk
    of them exists at a time, and the gradients of the hidden states and of the head are kept instead. With teachers
    there are their probabilities too, once as they are and once as the heads of MTP modules keep them.
    """
    num_heads = 1 + a.num_nextn_predict_layers
    logits = w.num_tokens * a.vocab_size
    hidden = w.num_tokens * a.hidden_size * w.compute_bytes
    if w.has_teachers:
        return num_heads * (hidden + 2 * FP32 * logits) + 2 * FP32 * logits
    if is_loss_chunked(w.num_tokens, a.vocab_size):
        chunk = 2 * min(CHUNK_BYTES[w.device] // FP32, logits) * (FP32 + w.compute_bytes)
        return num_heads * (hidden + FP32 * a.vocab_size * a.hidden_size) + chunk
    return num_heads * (hidden + FP32 * logits) + 2 * FP32 * logits


def moe_layer_bytes(a: Architecture, w: Workload) -> int:
    """Return what one MoE layer keeps for its backward pass: router, routed and shared experts, casts of their weights.

    It keeps its input as well, but not what the norm before it keeps.
    """
    layer = a.num_hidden_layers - 1
    assert a.is_moe(layer), "the architecture has no MoE layer"
    shared_casts = BF16 * a.n_shared_experts * expert_weights(a) if w.has_bf16_linears else 0
    return w.num_tokens * (moe_bytes(a, w) - w.norm(a.hidden_size)) + expert_cast_bytes(a, w, layer) + shared_casts

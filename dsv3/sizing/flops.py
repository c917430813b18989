"""How much arithmetic a token costs, in floating-point operations of matrix products.

A product of an (m, k) and a (k, n) matrix costs 2mkn: a multiplication and an addition each. So a token costs twice
the weights of every matrix that it passes (its `num_experts_per_tok` routed experts only, the head even where it is
tied, the embedding never: it is a look-up), and in each layer's attention, for every key that it sees,

    2 · heads · (qk_head_dim + v_head_dim)            scores and weighted values.

In training a token sees on average (S + 1) / 2 keys of a sequence of S tokens. A kernel that computes the whole S × S
square and masks half of it away executes more than is counted here: that is the kernel's loss, not the model's need, so
the share of the peak that is computed from these figures (MFU) is the conservative one.

The backward pass computes two products for each of the forward pass: with respect to the inputs and to the weights.
Training costs three times the forward pass; recomputation under gradient checkpointing is, like masked squares, not
counted.
Element-wise work (norms, softmax, SwiGLU, rotary positions) is left out: it is bound by memory, not by arithmetic.
"""

from dsv3.params.architecture import Architecture
from dsv3.sizing.parameters import attention_weights, expert_weights

FLOPS_PER_WEIGHT = 2
"""One multiplication and one addition."""

TRAINING_FACTOR = 3
"""Forward, gradient of the inputs, gradient of the weights."""


def block_matrix_weights(a: Architecture, layer: int) -> int:
    """Return the weights of the matrices that one token passes in decoder block number `layer`."""
    if not a.is_moe(layer):
        return attention_weights(a) + 3 * a.hidden_size * a.intermediate_size
    visited = a.num_experts_per_tok + a.n_shared_experts
    return attention_weights(a) + visited * expert_weights(a) + a.n_routed_experts * a.hidden_size


def keys_flops(a: Architecture) -> int:
    """Return the cost, in one layer, of one token's attention to one key: its score and its value's share."""
    return FLOPS_PER_WEIGHT * a.num_attention_heads * (a.qk_head_dim + a.v_head_dim)


def mean_keys(sequence_tokens: int) -> float:
    """Return how many keys a token of a causal sequence sees on average, itself included."""
    return (sequence_tokens + 1) / 2


def forward_flops_per_token(a: Architecture, keys: float) -> float:
    """Return the forward pass of the main network, for a token that attends to `keys` tokens, with the head."""
    weights = sum(block_matrix_weights(a, layer) for layer in range(a.num_hidden_layers))
    weights += a.vocab_size * a.hidden_size
    return FLOPS_PER_WEIGHT * weights + a.num_hidden_layers * keys_flops(a) * keys


def mtp_forward_flops_per_token(a: Architecture, keys: float) -> float:
    """Return the forward pass of all MTP modules: projection, block and the shared head once more for each."""
    flops = 0.0
    for depth in range(a.num_nextn_predict_layers):
        weights = 2 * a.hidden_size * a.hidden_size + a.vocab_size * a.hidden_size
        weights += block_matrix_weights(a, a.num_hidden_layers + depth)
        flops += FLOPS_PER_WEIGHT * weights + keys_flops(a) * keys
    return flops


def training_flops_per_token(a: Architecture, sequence_tokens: int) -> float:
    """Return the cost of training on one token of a sequence of `sequence_tokens`, MTP modules included.

    An MTP module of depth d predicts sequence_tokens - d of the tokens; this counts all of them.
    """
    keys = mean_keys(sequence_tokens)
    return TRAINING_FACTOR * (forward_flops_per_token(a, keys) + mtp_forward_flops_per_token(a, keys))


def decoding_flops_per_token(a: Architecture, context_tokens: int) -> float:
    """Return the cost of generating one token after `context_tokens`, from the cached latent with absorbed MLA.

    Absorbing the key and value up-projections into the query and the output costs, per generated token, as much as
    applying them to it; what changes is attention, whose keys are now latents (`kv_lora_rank` + rotary wide) and whose
    values are latents as well.
    """
    per_key = FLOPS_PER_WEIGHT * a.num_attention_heads * (2 * a.kv_lora_rank + a.qk_rope_head_dim)
    return forward_flops_per_token(a, 0) + a.num_hidden_layers * per_key * (context_tokens + 1)

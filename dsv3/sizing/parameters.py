"""How many parameters a DeepSeek-V3 network has, in closed form and without building it.

The network is L decoder blocks between an embedding and a head; a block is attention (MLA), a feed-forward part (dense
in the first `first_k_dense_replace` blocks, experts in the others) and two RMSNorms. There are three counts:

- *total*: what an optimizer updates and a checkpoint holds: `sum(p.numel())` of the model without its MTP modules.
- *active*: total less the routed experts that a token is not sent to, `(n_routed_experts - num_experts_per_tok)` in
  every MoE layer. It includes the embedding table, of which a token reads one row; the report's 37B leaves it out.
- *MTP*: the modules of multi-token prediction, apart because a served model may drop them. They share the embedding
  and the head with the main network.

The router's bias is no parameter (no gradient reaches it), so it is counted as a buffer.
"""

from collections import Counter

from dsv3.params.architecture import Architecture

PARTS = ("embedding", "head", "attention", "dense_mlp", "routed_experts", "shared_experts", "router", "norms")
"""What a main network consists of; an MTP module adds `projection`."""


def query_weights(a: Architecture) -> int:
    """Return the weights that make one layer's queries: one matrix, or two around a bottleneck of `q_lora_rank`."""
    width = a.num_attention_heads * a.qk_head_dim
    return a.hidden_size * width if a.q_lora_rank is None else a.q_lora_rank * (a.hidden_size + width)


def attention_weights(a: Architecture) -> int:
    """Return the weights in one layer's attention matrices: queries, the shared latent, keys and values, output."""
    heads = a.num_attention_heads
    latent = a.hidden_size * (a.kv_lora_rank + a.qk_rope_head_dim)
    keys_values = a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim)
    output = heads * a.v_head_dim * a.hidden_size
    return query_weights(a) + latent + keys_values + output


def attention_biases(a: Architecture) -> int:
    """Return the biases in one layer's attention; `attention_bias` adds them to the down-projections and the output."""
    if not a.attention_bias:
        return 0
    return (a.q_lora_rank or 0) + a.kv_lora_rank + a.qk_rope_head_dim + a.hidden_size


def expert_weights(a: Architecture) -> int:
    """Return the weights of one routed expert: gate, up and down projection."""
    return 3 * a.hidden_size * a.moe_intermediate_size


def block_parameters(a: Architecture, layer: int) -> Counter[str]:
    """Return the parameters by part of decoder block number `layer`; after the last comes that of an MTP module.

    An MTP module is a block, a projection from two concatenated states to one, and three RMSNorms: of the embedding,
    of the state and before the head.
    """
    parts: Counter[str] = Counter(attention=attention_weights(a) + attention_biases(a))
    parts["norms"] = 2 * a.hidden_size + a.kv_lora_rank + (a.q_lora_rank or 0)
    if a.is_moe(layer):
        parts["routed_experts"] = a.n_routed_experts * expert_weights(a)
        parts["shared_experts"] = a.n_shared_experts * expert_weights(a)
        parts["router"] = a.n_routed_experts * a.hidden_size
    else:
        parts["dense_mlp"] = 3 * a.hidden_size * a.intermediate_size
    if layer >= a.num_hidden_layers:
        parts.update(projection=2 * a.hidden_size * a.hidden_size, norms=3 * a.hidden_size)
    return parts


def parameters_by_part(a: Architecture) -> Counter[str]:
    """Return the parameters of the main network, by the parts named in `PARTS`."""
    parts: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    parts["embedding"] = a.vocab_size * a.hidden_size
    parts["head"] = 0 if a.tie_word_embeddings else a.vocab_size * a.hidden_size
    parts["norms"] = a.hidden_size
    for layer in range(a.num_hidden_layers):
        parts.update(block_parameters(a, layer))
    return parts


def mtp_parameters_by_part(a: Architecture) -> Counter[str]:
    """Return the parameters of all MTP modules (report, section 2.2), without the shared embedding and head."""
    parts: Counter[str] = Counter()
    for depth in range(a.num_nextn_predict_layers):
        parts.update(block_parameters(a, a.num_hidden_layers + depth))
    return parts


def num_parameters(a: Architecture) -> int:
    """Return the parameters of the main network."""
    return sum(parameters_by_part(a).values())


def num_mtp_parameters(a: Architecture) -> int:
    """Return the parameters of the MTP modules."""
    return sum(mtp_parameters_by_part(a).values())


def num_active_parameters(a: Architecture) -> int:
    """Return the parameters of the main network that take part in a token's forward pass, embedding table included."""
    unvisited = a.n_routed_experts - a.num_experts_per_tok
    return num_parameters(a) - a.num_moe_layers * unvisited * expert_weights(a)


def num_router_biases(a: Architecture) -> int:
    """Return the elements of `e_score_correction_bias` over all layers, those of the MTP modules included."""
    layers = a.num_hidden_layers + a.num_nextn_predict_layers
    return sum(a.n_routed_experts for layer in range(layers) if a.is_moe(layer))

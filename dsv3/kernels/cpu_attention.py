"""Causal attention on a CPU: the half of the scores that counts, a block of queries at a time.

torch's fused kernel on a CPU wants values as wide as queries, which latent attention's are not. What it takes instead
multiplies all S x S scores, of which a causal mask hides half, looks for rows without a key, and in bf16 computes in
fp32. Here a block of queries is multiplied with the keys up to its own end alone; the mask is needed in the block's own
square only, and every row has a key. In bf16 all four products take bf16 operands, as in transformers' eager attention:
scores are rounded to bf16 before the softmax, which computes in fp32.

With the weights w = softmax(scaling · q k.T) and the output o = w v, of which w is kept, the gradients are

    dv = w.T do,    ds = w * (dw - rowsum(w * dw)) with dw = do v.T,    dq = scaling · ds k,    dk = scaling · ds.T q

each a sum over blocks. The alternative, values padded with zeros for torch's fused kernel, keeps no weights, and took
as long as no kernel at all (docs/log.md). What we give up: the weights in memory, half a square per head; and masks,
such as those between documents, which are left to torch.

Letters: B sequences, H num_attention_heads, S positions, X keys, U v_head_dim, R rows, W columns.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dsv3.sizing.causal_attention import blocks, num_kept_weights

NAME = "dsv3_cpu"
"""As `model.set_attn_implementation` takes it, and as trainings record it."""

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def register() -> str:
    """Let transformers' models attend by this module; return the name that they know it by."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attention_forward(  # noqa: PLR0913 (transformers calls it by these names)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output (B, S, H, U) from query, key (B, H, S, W) and value (B, H, S, U).

    Where a mask, dropout, keys of earlier positions or another type is asked for, torch's attention returns it.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    is_whole = attention_mask is None and query.shape[2] == key.shape[2]
    if not is_whole or dropout or scaling is None or dtype not in PRECISIONS:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    return causal_attention(query, key, value, scaling)[0].transpose(1, 2), None


@torch.library.custom_op("dsv3::causal_attention_cpu", mutates_args=())
def causal_attention(query_BHSW: Tensor, key_BHSW: Tensor, value_BHSU: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, S, U), whose heads lie beside each other, and the weights of all blocks."""
    num_sequences, num_heads, num_positions, _ = query_BHSW.shape
    query, key, value = (tensor.reshape(-1, *tensor.shape[2:]) for tensor in (query_BHSW, key_BHSW, value_BHSU))
    weights = query.new_empty(len(query) * num_kept_weights(num_positions, PRECISIONS[query.dtype]))
    output_BSHU = query.new_empty(num_sequences, num_positions, num_heads, value.shape[-1])
    for rows, at in blocks(num_positions, PRECISIONS[query.dtype]):
        scores = torch.baddbmm(_mask(rows, query), query[:, rows], key[:, : rows.stop].mT, alpha=scaling)
        own = _of_block(weights, len(query), rows, at)
        torch.softmax(scores, dim=-1, out=own)
        output = torch.bmm(own, value[:, : rows.stop])
        output_BSHU[:, rows] = output.view(num_sequences, num_heads, *output.shape[1:]).transpose(1, 2)
    return output_BSHU.transpose(1, 2), weights


@torch.library.custom_op("dsv3::causal_attention_cpu_backward", mutates_args=())
def causal_attention_backward(
    grad_BHSU: Tensor, query_BHSW: Tensor, key_BHSW: Tensor, value_BHSU: Tensor, weights: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by query, key and value."""
    given = (grad_BHSU, query_BHSW, key_BHSW, value_BHSU)
    grad, query, key, value = (tensor.reshape(-1, *tensor.shape[2:]) for tensor in given)
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for rows, at in blocks(query.shape[1], PRECISIONS[query.dtype]):
        keys, own = slice(rows.stop), _of_block(weights, len(query), rows, at)
        grad_value[:, keys] += torch.bmm(own.mT, grad[:, rows])
        grad_own = torch.bmm(grad[:, rows], value[:, keys].mT)
        grad_scores = torch._softmax_backward_data(grad_own, own, -1, own.dtype).mul_(scaling)
        grad_query[:, rows] = torch.bmm(grad_scores, key[:, keys])
        grad_key[:, keys] += torch.bmm(grad_scores.mT, query[:, rows])
    return grad_query.view(query_BHSW.shape), grad_key.view(key_BHSW.shape), grad_value.view(value_BHSU.shape)


def _mask(rows: slice, like: Tensor) -> Tensor:
    """Return what is added to a block's scores (R, X): minus infinity for the keys behind each query, else 0."""
    num_rows = rows.stop - rows.start
    mask_RX = like.new_zeros(num_rows, rows.stop)
    mask_RX[:, rows] = like.new_full((num_rows, num_rows), float("-inf")).triu_(1)
    return mask_RX


def _of_block(weights: Tensor, num_heads: int, rows: slice, at: int) -> Tensor:
    """Return the weights of a block, (B · H, R, X), which lie together."""
    shape = (num_heads, rows.stop - rows.start, rows.stop)
    return weights[num_heads * at :][: shape[0] * shape[1] * shape[2]].view(shape)


@causal_attention.register_fake
def _(query_BHSW: Tensor, key_BHSW: Tensor, value_BHSU: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    num_sequences, num_heads, num_positions, _ = query_BHSW.shape
    output_BSHU = query_BHSW.new_empty(num_sequences, num_positions, num_heads, value_BHSU.shape[-1])
    kept = num_sequences * num_heads * num_kept_weights(num_positions, PRECISIONS[query_BHSW.dtype])
    return output_BSHU.transpose(1, 2), query_BHSW.new_empty(kept)


@causal_attention_backward.register_fake
def _(
    grad_BHSU: Tensor, query_BHSW: Tensor, key_BHSW: Tensor, value_BHSU: Tensor, weights: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query_BHSW.new_empty(query_BHSW.shape),
        key_BHSW.new_empty(key_BHSW.shape),
        value_BHSU.new_empty(value_BHSU.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling = inputs
    ctx.set_materialize_grads(False)  # else zeros for the weights, which nobody reads
    ctx.save_for_backward(*tensors, output[1])


def _gradients(ctx: Any, grad_BHSU: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_BHSU is None:
        return None, None, None, None
    return *causal_attention_backward(grad_BHSU, *ctx.saved_tensors, ctx.scaling), None


causal_attention.register_autograd(_gradients, setup_context=_save)

"""Cross entropy of a large vocabulary whose logits never exist at once.

The plain form multiplies the hidden states by the output head and hands T x V logits to the cross entropy, which keeps
their softmax for the backward pass: at 4,096 tokens and a vocabulary of 129,280 that is 2 GiB twice over, more than all
the activations of a layer. Here the tokens are taken a chunk at a time. A chunk's logits give its loss, and, because
the derivative of the loss by the logits is just softmax minus one-hot, its share of both gradients too; then they are
thrown away. The backward pass only scales what the forward pass computed, so nothing is computed twice.

We give up two things: a second derivative, and a gradient of the head that exists from the forward pass on. torch's
`F.linear_cross_entropy` does the same arithmetic; this one computes in the autocast type and sums the head's gradient
in fp32 over all chunks whatever that type is.

Letters: T tokens, D hidden_size, V vocab_size, R rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dsv3.sizing.chunked_loss import CHUNK_BYTES
from mini_model.modeling_deepseek import IGNORED_LABEL


def chunked_cross_entropy(hidden_TD: Tensor, head_weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Return the mean cross entropy of `hidden @ head.T` over the labels that are not -100, in fp32.

    The same value and gradients as the plain form up to the order of summation. Extra memory: one chunk of logits,
    and the two gradients, which the plain form's backward pass allocates as well.
    """
    device_type = hidden_TD.device.type
    if torch.is_autocast_enabled(device_type):
        compute_dtype = torch.get_autocast_dtype(device_type)
        hidden_TD = hidden_TD.to(compute_dtype)
    with torch.autocast(device_type, enabled=False):
        loss: Tensor = ChunkedCrossEntropy.apply(hidden_TD, head_weight_VD, labels_T)
    return loss


class ChunkedCrossEntropy(torch.autograd.Function):
    """The loss, with both gradients computed in the forward pass chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        """Return the mean loss; keep the gradients by the hidden states and by the head, of those that are wanted."""
        wants_hidden, wants_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        head_VD = head_weight_VD.to(hidden_TD.dtype)
        count = (labels_T != IGNORED_LABEL).sum().clamp(min=1)
        hidden_grad_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        head_grad_VD = torch.zeros_like(head_weight_VD, dtype=torch.float32) if wants_head else None
        loss = hidden_TD.new_zeros((), dtype=torch.float32)
        chunk_tokens = max(1, CHUNK_BYTES[hidden_TD.device.type] // (4 * head_VD.shape[0]))
        for start in range(0, len(labels_T), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            hidden_RD, labels_R = hidden_TD[chunk], labels_T[chunk]
            chunk_loss, logits_grad_RV = _loss_and_logits_gradient(hidden_RD @ head_VD.T, labels_R, count)
            loss += chunk_loss
            if hidden_grad_TD is not None:
                torch.mm(logits_grad_RV, head_VD, out=hidden_grad_TD[chunk])
            if head_grad_VD is not None:
                _add_product(head_grad_VD, logits_grad_RV, hidden_RD)
        ctx.gradients = hidden_grad_TD, head_grad_VD
        ctx.head_dtype = head_weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the parameters' names)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the kept gradients, scaled by the derivative of whatever the loss went into."""
        hidden_grad_TD, head_grad_VD = ctx.gradients
        (scale,) = grad_outputs
        return (
            None if hidden_grad_TD is None else hidden_grad_TD * scale.to(hidden_grad_TD.dtype),
            None if head_grad_VD is None else (head_grad_VD * scale).to(ctx.head_dtype),
            None,
        )


def _loss_and_logits_gradient(logits_RV: Tensor, labels_R: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return a chunk's share of the mean loss and its derivative by the logits, in the logits' type."""
    dtype, kept_R = logits_RV.dtype, labels_R != IGNORED_LABEL
    log_softmax_RV = F.log_softmax(logits_RV.float(), dim=-1)
    del logits_RV
    index_R1 = labels_R.clamp(min=0).unsqueeze(1)
    losses_R = -log_softmax_RV.gather(1, index_R1).squeeze(1) * kept_R
    gradient_RV = log_softmax_RV.exp_()
    gradient_RV.scatter_add_(1, index_R1, torch.full_like(index_R1, -1.0, dtype=torch.float32))
    gradient_RV *= (kept_R / count).unsqueeze(1)
    return losses_R.sum() / count, gradient_RV.to(dtype)


def _add_product(total_VD: Tensor, gradient_RV: Tensor, hidden_RD: Tensor) -> None:
    """Add `gradient.T @ hidden` to the fp32 `total`."""
    if gradient_RV.dtype == torch.float32:
        total_VD.addmm_(gradient_RV.T, hidden_RD)
    else:
        total_VD += gradient_RV.T @ hidden_RD

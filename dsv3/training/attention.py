"""By which of torch's kernels a training attends: torch chooses silently, and one of them writes all scores.

Letters: S positions
"""

import torch
from torch.nn.attention import SDPBackend

from dsv3.params.architecture import Architecture
from dsv3.params.train import TrainParams
from dsv3.training.precision import autocast_dtype

KERNELS = {
    SDPBackend.MATH: "math",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
}
"""math: products and a softmax, with S x S scores of every head in memory; the others keep a few rows of them."""


def attention_kernel(architecture: Architecture, train: TrainParams, device: torch.device) -> str:
    """Return the name of the kernel that torch takes on `device`, by the widths, the type and the mask of a training.

    torch asks the same function when it attends. Most kernels want values as wide as queries, which latent attention's
    are not.
    """
    dtype = autocast_dtype(train.precision, device)
    widths = (architecture.qk_head_dim, architecture.qk_head_dim, architecture.v_head_dim)
    query, key, value = (
        torch.empty(1, 1, train.block_size, width, dtype=dtype, device=device, requires_grad=True) for width in widths
    )
    is_causal = train.cross_document_attention
    shape = (train.block_size, train.block_size)
    mask = None if is_causal else torch.ones(1, 1, *shape, dtype=torch.bool, device=device)
    chosen = torch._fused_sdp_choice(query, key, value, mask, architecture.attention_dropout, is_causal)
    return KERNELS[SDPBackend(chosen)]

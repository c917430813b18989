"""By which kernel a training attends: torch chooses silently, and one of its own writes all scores.

Letters: S positions
"""

import torch
from torch.nn.attention import SDPBackend

from dsv3.kernels import cpu_attention
from dsv3.params.architecture import Architecture
from dsv3.params.train import TrainParams
from dsv3.sizing.causal_attention import is_attention_blocked
from dsv3.training.precision import autocast_dtype
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM

KERNELS = {
    SDPBackend.MATH: "math",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
}
"""math: products and a softmax, with S x S scores of every head in memory; the others keep a few rows of them."""


def choose_attention(
    model: DeepseekV3ForCausalLM, architecture: Architecture, train: TrainParams, device: torch.device
) -> str:
    """Let the model of a training attend by the project's own kernel where it is the best; return what attends."""
    kernel = attention_kernel(architecture, train, device)
    if kernel == cpu_attention.NAME:
        model.set_attn_implementation(cpu_attention.register())
    return kernel


def attention_kernel(architecture: Architecture, train: TrainParams, device: torch.device) -> str:
    """Return the name of the kernel that attends on `device`, by the widths, the type and the mask of a training.

    torch asks the same function when it attends. Most kernels want values as wide as queries, which latent attention's
    are not; on a CPU the project's own then takes the place of torch's (`dsv3.kernels.cpu_attention`).
    """
    widths = (architecture.qk_head_dim, architecture.qk_head_dim, architecture.v_head_dim)
    dropout, is_causal = architecture.attention_dropout, train.cross_document_attention
    if device.type == "cpu" and is_attention_blocked(*widths[1:], dropout, is_causal):
        return cpu_attention.NAME
    dtype = autocast_dtype(train.precision, device)
    query, key, value = (
        torch.empty(1, 1, train.block_size, width, dtype=dtype, device=device, requires_grad=True) for width in widths
    )
    shape = (train.block_size, train.block_size)
    mask = None if is_causal else torch.ones(1, 1, *shape, dtype=torch.bool, device=device)
    chosen = torch._fused_sdp_choice(query, key, value, mask, dropout, is_causal)
    return KERNELS[SDPBackend(chosen)]

"""Experts through torch's grouped GEMM: one kernel for all experts on a Hopper GPU (bf16).

What `F.grouped_mm` asks for and nobody casts on its behalf: equal dtypes (it ignores autocast, so fp32 master weights
would multiply in fp32, in a loop over the experts), int32 end rows, and incoming gradients that are contiguous. Its
shape function refuses fp32, so torch.compile steps aside there.

Letters: T tokens, K experts per token, S = T * K pairs sorted by expert, E experts, H hidden size, I intermediate size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.kernels.permute import expert_order, sum_per_token

uncompiled_grouped_mm: Any = torch.compiler.disable(F.grouped_mm)
"""Computed eagerly in the middle of a compiled model."""


def experts(hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor) -> Tensor:
    """Return the weighted sum of each token's experts, shape (T, H); all floating tensors of one dtype, not fp64."""
    order = expert_order(index_TK, gate_up_E2IH.shape[0])
    grouped_mm = F.grouped_mm if hidden_TH.dtype == torch.bfloat16 else uncompiled_grouped_mm
    gate_up_S2I = grouped_mm(hidden_TH[order.token_S], gate_up_E2IH.transpose(1, 2), offs=order.end_E)
    gate_SI, up_SI = gate_up_S2I.chunk(2, dim=-1)
    act_SI = F.silu(gate_SI) * up_SI * weight_TK.reshape(-1, 1)[order.pair_S]
    output_SH = grouped_mm(act_SI, down_EHI.transpose(1, 2), offs=order.end_E)
    return sum_per_token(output_SH, order.position_TK)

"""Experts through torch's grouped GEMM: one kernel for all experts on a Hopper GPU (bf16).

What `F.grouped_mm` asks for and nobody casts on its behalf: equal dtypes (it ignores autocast, so fp32 master weights
would multiply in fp32, in a loop over the experts), int32 end rows, and incoming gradients that are contiguous. Its
shape function refuses fp32, so torch.compile steps aside there.

Letters: T tokens, K num_experts_per_tok, A assignments, E n_routed_experts, D hidden_size, F intermediate_size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.kernels.permute import expert_order, sum_per_token

uncompiled_grouped_mm: Any = torch.compiler.disable(F.grouped_mm)
"""Computed eagerly in the middle of a compiled model."""


def experts(hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Return the weighted sum of each token's experts, shape (T, D); all floating tensors of one dtype, not fp64."""
    order = expert_order(index_TK, gate_up_E2FD.shape[0])
    grouped_mm = F.grouped_mm if hidden_TD.dtype == torch.bfloat16 else uncompiled_grouped_mm
    gate_up_A2F = grouped_mm(hidden_TD[order.token_A], gate_up_E2FD.transpose(1, 2), offs=order.end_E)
    gate_AF, up_AF = gate_up_A2F.chunk(2, dim=-1)
    act_AF = F.silu(gate_AF) * up_AF * weight_TK.reshape(-1, 1)[order.assignment_A]
    output_AD = grouped_mm(act_AF, down_EDF.transpose(1, 2), offs=order.end_E)
    return sum_per_token(output_AD, order.position_TK)

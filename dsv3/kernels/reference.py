"""The experts as the paper writes them (section 2.1.2, equation 12): slow, readable, the oracle of every other backend.

Letters: T tokens, K experts per token, E experts, H hidden size, I intermediate size, n tokens of one expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def experts(hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor) -> Tensor:
    """Return the weighted sum of each token's experts, shape (T, H); any dtype, any device, gradients by autograd."""
    output_TH = torch.zeros_like(hidden_TH)
    for expert, (gate_up_2IH, down_HI) in enumerate(zip(gate_up_E2IH.unbind(), down_EHI.unbind(), strict=True)):
        token_n, choice_n = torch.where(index_TK == expert)
        gate_nI, up_nI = F.linear(hidden_TH[token_n], gate_up_2IH).chunk(2, dim=-1)
        expert_nH = F.linear(F.silu(gate_nI) * up_nI, down_HI)
        output_TH = output_TH.index_add(0, token_n, expert_nH * weight_TK[token_n, choice_n, None])
    return output_TH

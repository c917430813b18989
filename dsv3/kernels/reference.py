"""The model's own loop over its experts as a backend: slow, readable, the oracle of every other one.

Letters: T tokens, K num_experts_per_tok, E n_routed_experts, D hidden_size, F intermediate_size.
"""

from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mini_model.modeling_deepseek import DeepseekV3Experts

model_loop: Any = DeepseekV3Experts.forward.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
"""`DeepseekV3Experts.forward` as it is written; transformers wraps it to choose a backend."""


def experts(hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Return the weighted sum of each token's experts, shape (T, D); any dtype, any device, gradients by autograd."""
    weights = {"gate_up_proj": gate_up_E2FD.unbind(), "down_proj": down_EDF.unbind()}
    module = SimpleNamespace(num_experts=len(gate_up_E2FD), act_fn=F.silu, **weights)
    return model_loop(module, hidden_TD, index_TK, weight_TK)

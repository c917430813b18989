"""SwiGLU with a hand-written backward pass.

Only the input of the activation is kept; its output is recomputed in the backward pass, as in the report (section
3.2.3), because it costs one pass over memory and saves a third of what a layer keeps.

Gate and up lie side by side in one (R, 2F) tensor, as their GEMM writes them.

Letters: R rows, F intermediate_size.
"""

import torch
from torch import Tensor

aten = torch.ops.aten


def swiglu(gate_up_R2F: Tensor) -> Tensor:
    """Return silu(gate) * up, shape (R, F)."""
    gate_RF, up_RF = gate_up_R2F.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_RF).mul_(up_RF)


def swiglu_backward(grad_RF: Tensor, gate_up_R2F: Tensor, silu_RF: Tensor) -> Tensor:
    """Return the gradient by `gate_up_R2F`; overwrites `grad_RF`. `silu_RF` is silu(gate), which the caller has."""
    gate_RF, up_RF = gate_up_R2F.chunk(2, dim=-1)
    grad_R2F = torch.empty_like(gate_up_R2F)
    grad_gate_RF, grad_up_RF = grad_R2F.chunk(2, dim=-1)
    torch.mul(grad_RF, silu_RF, out=grad_up_RF)
    aten.silu_backward.grad_input(grad_RF.mul_(up_RF), gate_RF, grad_input=grad_gate_RF)
    return grad_R2F

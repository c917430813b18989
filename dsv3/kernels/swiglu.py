"""SwiGLU with a hand-written backward pass.

Only the input of the activation is kept; its output is recomputed in the backward pass, as in the report (section
3.2.3), because it costs one pass over memory and saves a third of what a layer keeps.

Letters: R rows, I intermediate size; gate and up lie side by side in one (R, 2I) tensor, as their GEMM writes them.
"""

import torch
from torch import Tensor

aten = torch.ops.aten


def swiglu(gate_up_R2I: Tensor) -> Tensor:
    """Return silu(gate) * up, shape (R, I)."""
    gate_RI, up_RI = gate_up_R2I.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_RI).mul_(up_RI)


def swiglu_backward(grad_RI: Tensor, gate_up_R2I: Tensor, silu_RI: Tensor) -> Tensor:
    """Return the gradient by `gate_up_R2I`; overwrites `grad_RI`. `silu_RI` is silu(gate), which the caller has."""
    gate_RI, up_RI = gate_up_R2I.chunk(2, dim=-1)
    grad_R2I = torch.empty_like(gate_up_R2I)
    grad_gate_RI, grad_up_RI = grad_R2I.chunk(2, dim=-1)
    torch.mul(grad_RI, silu_RI, out=grad_up_RI)
    aten.silu_backward.grad_input(grad_RI.mul_(up_RI), gate_RI, grad_input=grad_gate_RI)
    return grad_R2I

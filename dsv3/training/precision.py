"""In which number format a training multiplies, and on which device: decided once, and recorded."""

import torch

from dsv3.devices import multiplies_bf16

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolved_precision(precision: str, device: torch.device) -> str:
    """Return `fp32` or `bf16`; auto is bf16 on a GPU that multiplies it natively, fp32 on every CPU.

    A CPU with bf16 instructions (AMX) gained nothing at nano's sizes: 465 against 454 ms of one thread per step, and
    every new number of rows per expert costs it 6 ms instead of 1. And so a CPU's result depends on no instruction set.
    """
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and multiplies_bf16(device) else "fp32"


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the format of native matrix products: bf16 where it is asked for and native, else fp32.

    `precision: bf16` on a device without native bf16 is emulated: operands are rounded to bf16, products are fp32.
    """
    is_bf16 = resolved_precision(precision, device) == "bf16" and multiplies_bf16(device)
    return torch.bfloat16 if is_bf16 else torch.float32

"""The products of one linear layer in block-scaled FP8: cuBLAS where it multiplies this format, else our kernels.

cuBLAS has products of 1 x 128 blocks with 128 x 128 (forward, dgrad) and with 1 x 128 (wgrad) since CUDA 12.9, for
Hopper alone, and torch reaches them by `F.scaled_mm`. On an H100 forward was 1.6 times as fast as the grouped kernel
with one group (docs/gpu.md). It reads the operands as our quantizers leave them, but for two copies of scales: those of
rows it wants rows first, those of a weight in rows of a multiple of four.

A layout that is misread is no error but wrong numbers, so cuBLAS is trusted on a device once it has given there what
our kernel gives. What we give up: its sums are added in another order than ours, so the last bit of a result in bf16
may differ between the two, and a little memory is copied for the scales.

The values of column-quantized operands reach past R, to the end of the last tile of rows.

Letters: R rows, O outputs, I inputs.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3.fp8.definition import BLOCK
from dsv3.fp8.quantize import Quantized
from dsv3.kernels.triton_launch import (
    Schedule,
    grouped_gemm,
    grouped_wgrad,
    quantize_columns,
    quantize_rows,
    quantize_weight,
    schedule,
)

HOPPER_CAPABILITY = (9, 0)
CUDA_VERSION = (12, 9)
SCALES_TOGETHER = 4
"""cuBLAS reads scales in vectors of 16 bytes."""
LARGEST_DIFFERENCE = 0.01
"""Between two products, by the norm: both may round to bf16 (0.002), a wrong scale is of the size of the result."""


def dense_gemm(a_RI: Quantized, b_OI: Quantized, tiles: Schedule, dtype: torch.dtype) -> Tensor:
    """Return y (R, O) in `dtype`: rows times the transpose of `b_OI`, a stack (1, O, I) of one weight."""
    device, num_rows = b_OI.values.device, len(a_RI.values)
    if dense_kernel(device, num_rows, dtype) == "scaled_mm":
        return cublas_gemm(a_RI, b_OI)
    return grouped_gemm(a_RI, None, b_OI, tiles, num_rows, dtype)


def dense_wgrad(grad_OR: Quantized, x_IR: Quantized, tiles: Schedule, num_rows: int) -> Tensor:
    """Return the weight's gradient (O, I) in fp32 from column-quantized gradient and input of `num_rows` rows."""
    device = grad_OR.values.device
    if cublas_takes(device, num_rows) and cublas_agrees(device):
        return cublas_wgrad(grad_OR, x_IR, num_rows)
    return grouped_wgrad(grad_OR, x_IR, tiles, torch.float32)[0]


def dense_kernel(device: torch.device, num_rows: int, dtype: torch.dtype) -> str:
    """Return what multiplies that many rows in forward and dgrad, into `dtype`; each training records it.

    `scaled_mm` is torch's function for cuBLAS, `triton` the project's kernel. Asking compares the two, once per device.
    """
    is_trusted = dtype == torch.bfloat16 and cublas_takes(device, num_rows) and cublas_agrees(device)
    return "scaled_mm" if is_trusted else "triton"


def cublas_takes(device: torch.device, num_rows: int) -> bool:
    """Return whether cuBLAS multiplies operands of that many rows on the device; whole blocks of rows alone."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    if version < CUDA_VERSION or torch.cuda.get_device_capability(device) != HOPPER_CAPABILITY:
        return False
    return num_rows > 0 and num_rows % BLOCK == 0


def cublas_gemm(a_RI: Quantized, b_OI: Quantized) -> Tensor:
    """Return the product by `F.scaled_mm`, in bf16."""
    scale_a_RI = a_RI.scales.t().contiguous().t()
    gap = -b_OI.scales.shape[-1] % SCALES_TOGETHER
    scale_b_IO = (F.pad(b_OI.scales[0], (0, gap)) if gap else b_OI.scales[0]).t()
    kinds, values_IO = (F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128), b_OI.values[0].t()
    return F.scaled_mm(a_RI.values, values_IO, scale_a_RI, kinds[0], scale_b_IO, kinds[1], output_dtype=torch.bfloat16)


def cublas_wgrad(grad_OR: Quantized, x_IR: Quantized, num_rows: int) -> Tensor:
    """Return the gradient by `F.scaled_mm`, in fp32; the tiles past the last row, which hold nothing, are left out."""
    kind, num_tiles = F.ScalingType.BlockWise1x128, num_rows // BLOCK
    grad_values_OR, x_values_RI = grad_OR.values[:, :num_rows], x_IR.values[:, :num_rows].t()
    grad_scales, x_scales = (operand.scales[:num_tiles].t() for operand in (grad_OR, x_IR))
    return F.scaled_mm(grad_values_OR, x_values_RI, grad_scales, kind, x_scales, kind, output_dtype=torch.float32)


@lru_cache(maxsize=64)
def cublas_agrees(device: torch.device) -> bool:
    """Return whether cuBLAS and our kernels give the same products on the device; False where torch refuses them."""
    generator = torch.Generator(device).manual_seed(0)
    num_rows, num_inputs, num_outputs = 2 * BLOCK, 5 * BLOCK, 3 * BLOCK

    def operand(*shape: int) -> Tensor:
        """Return normal numbers with magnitudes of their own in each block, so that no two scales are alike."""
        numbers = torch.randn(*shape, device=device, generator=generator).view(-1, BLOCK)
        return (numbers * torch.logspace(-1, 1, len(numbers), device=device)[:, None]).view(shape)

    x_RI, w_OI, grad_RO = (
        operand(num_rows, num_inputs),
        operand(num_outputs, num_inputs),
        operand(num_rows, num_outputs),
    )
    rows, weight = quantize_rows(x_RI, False), quantize_weight(w_OI[None], False).forward
    tiles = schedule(torch.full((1,), num_rows, dtype=torch.int32, device=device), num_rows)
    columns = [quantize_columns(tensor, tiles, None, False) for tensor in (grad_RO, x_RI)]
    ours = [
        grouped_gemm(rows, None, weight, tiles, num_rows, torch.bfloat16),
        grouped_wgrad(columns[0], columns[1], tiles, torch.float32)[0],
    ]
    try:
        theirs = [cublas_gemm(rows, weight), cublas_wgrad(columns[0], columns[1], num_rows)]
    except (RuntimeError, ValueError):
        return False
    return all(
        bool((their.float() - our.float()).norm() <= LARGEST_DIFFERENCE * our.float().norm())
        for their, our in zip(theirs, ours, strict=True)
    )

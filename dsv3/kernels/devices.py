"""What a device multiplies natively."""

import torch

FP8_CAPABILITY = (8, 9)
"""Ada and Hopper multiply e4m3; Triton refuses to compile it for anything older."""
BF16_CAPABILITY = (8, 0)
"""Ampere."""


def multiplies_fp8(device: torch.device) -> bool:
    """Return whether the device has e4m3 matrix instructions that Triton can reach."""
    if device.type != "cuda" or torch.version.hip is not None:  # AMD's GPUs have a capability, too, and other formats
        return False
    return torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 natively.

    A CPU without AVX512-BF16 and AMX is 27 times slower in bf16 than in fp32; one with AMX several times faster.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

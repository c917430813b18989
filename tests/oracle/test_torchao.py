"""MXFP8 as torchao quantizes it for Blackwell; it is no dependency of this project: `pip install torchao`."""

import pytest
import torch

from dsv3.fp8.quantize import quantized_rows, rounded_rows
from dsv3.fp8.recipe import Recipe

mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
config = pytest.importorskip("torchao.prototype.mx_formats.config")

MXFP8 = Recipe(mx_blocks=True).blocks


@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_numbers_and_scales_are_torchaos(spread):
    """Ordinary numbers, and blocks whose largest ones lie many powers of two apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 512, generator=generator) * (spread * torch.randn(256, 512, generator=generator)).exp2()
    scales, values = mx.to_mx(x, torch.float8_e4m3fn, MXFP8["block"], config.ScaleCalculationMode.RCEIL)
    ours = quantized_rows(x, **MXFP8)
    assert torch.equal(ours.values.view(torch.uint8), values.view(torch.uint8).view(ours.values.shape))
    assert torch.equal(ours.scales, (scales.view(torch.uint8).float() - 127).exp2())
    meant = values.float().view(*scales.shape, -1) * (scales.view(torch.uint8).float() - 127).exp2()[..., None]
    assert torch.equal(rounded_rows(x, **MXFP8), meant.view(x.shape))

"""When torch's dense block-scaled product is taken, and that torch takes our operands for it, all without a GPU."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="triton is installed with CUDA builds of torch, and by the dev extra")

from dsv3.fp8.quantize import Quantized
from dsv3.kernels import dense_gemm
from tests.committed import PROJECT

GPU = torch.device("cuda")


def operand(num_rows: int, num_inputs: int, block_rows: int) -> Quantized:
    """Return e4m3 numbers and scales of blocks of `block_rows` rows, as the quantizers lay them out."""
    values = torch.empty(num_rows, num_inputs, dtype=torch.float8_e4m3fn)
    return Quantized(values, torch.empty(-(-num_rows // block_rows), num_inputs // 128))


def widths() -> set[int]:
    """Return the widths of linear layers of the committed architectures, padded to blocks."""
    names = ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank")
    found = set()
    for path in PROJECT.glob("mini_model/config*.json"):
        config = json.loads(path.read_text())
        found |= {-(-config[name] // 128) * 128 for name in names if config.get(name)}
    return found


@pytest.mark.parametrize("num_inputs", sorted({*widths(), 128, 384, 640}))
def test_torch_accepts_the_layout_of_our_scales(num_inputs):
    """torch 2.13 checks shapes and strides of scales on fake tensors too, by the rules of its CUDA function."""
    with FakeTensorMode():
        weight = operand(256, num_inputs, 128)
        stack = Quantized(weight.values[None], weight.scales[None])
        y = dense_gemm.cublas_gemm(operand(512, num_inputs, 1), stack)
    assert (y.shape, y.dtype) == ((512, 256), torch.bfloat16)


@pytest.mark.parametrize("num_rows", [128, 256, 4096])
def test_torch_accepts_the_columns_of_a_weight_gradient(num_rows):
    num_tiles = num_rows // 128 + 1
    with FakeTensorMode():
        grad, x = (
            Quantized(torch.empty(width, num_tiles * 128, dtype=torch.float8_e4m3fn), torch.empty(num_tiles, width))
            for width in (384, 640)
        )
        y = dense_gemm.cublas_wgrad(grad, x, num_rows)
    assert (y.shape, y.dtype) == ((384, 640), torch.float32)


def test_torch_would_refuse_scales_as_they_are():
    """The test above can fail: rows' scales inputs first, as the quantizer leaves them, are not accepted."""
    with FakeTensorMode(), pytest.raises(RuntimeError, match="scale a must have shape"):
        a, b = operand(512, 512, 1), operand(256, 512, 128)
        kinds = dense_gemm.F.ScalingType.BlockWise1x128, dense_gemm.F.ScalingType.BlockWise128x128
        dense_gemm.F.scaled_mm(a.values, b.values.t(), a.scales, kinds[0], b.scales.t(), kinds[1])


@pytest.mark.parametrize(
    ("taken", "change"),
    [
        (True, {}),
        (False, {"capability": (8, 9)}),
        (False, {"capability": (10, 0)}),
        (False, {"cuda": "12.8"}),
        (True, {"cuda": "13.0"}),
        (False, {"cuda": None}),
        (False, {"num_rows": 0}),
        (False, {"num_rows": 130}),
        (False, {"device": torch.device("cpu")}),
    ],
)
def test_cublas_is_asked_for_what_it_has(taken, change, monkeypatch):
    asked = {"capability": (9, 0), "cuda": "12.9", "num_rows": 256, "device": GPU} | change
    monkeypatch.setattr(torch.version, "cuda", asked["cuda"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked["capability"])
    assert dense_gemm.cublas_takes(asked["device"], asked["num_rows"]) is taken


@pytest.mark.parametrize(("takes", "agrees", "chosen"), [(1, 1, "cublas"), (1, 0, "ours"), (0, 1, "ours")])
def test_ours_multiply_where_cublas_does_not_or_is_not_trusted(takes, agrees, chosen, monkeypatch):
    monkeypatch.setattr(dense_gemm, "cublas_takes", lambda *arguments: bool(takes))
    monkeypatch.setattr(dense_gemm, "cublas_agrees", lambda device: bool(agrees))
    for name in ("cublas_gemm", "cublas_wgrad"):
        monkeypatch.setattr(dense_gemm, name, lambda *arguments: "cublas")
    monkeypatch.setattr(dense_gemm, "grouped_gemm", lambda *arguments: "ours")
    monkeypatch.setattr(dense_gemm, "grouped_wgrad", lambda *arguments: ["ours"])
    rows, weight = operand(256, 128, 1), operand(128, 128, 128)
    assert dense_gemm.dense_gemm(rows, weight, None, torch.bfloat16) == chosen
    assert dense_gemm.dense_gemm(rows, weight, None, torch.float32) == "ours", "cuBLAS writes bf16 there"
    assert dense_gemm.dense_wgrad(rows, rows, None, 256) == chosen
    recorded = {"cublas": "scaled_mm", "ours": "triton"}
    assert dense_gemm.dense_kernel(GPU, 256, torch.bfloat16) == recorded[chosen]
    assert dense_gemm.dense_kernel(GPU, 256, torch.float32) == "triton"

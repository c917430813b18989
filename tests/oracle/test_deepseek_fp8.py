"""Folders in FP8 as DeepSeek's own programs read them: inference/fp8_cast_bf16.py and inference/kernel.py of its V3."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockModel

from dsv3.export.fp8 import export_fp8
from dsv3.fp8.quantize import rounded_weight
from tests.exported_model import broken, write_exported

SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 2,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 0,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "initializer_range": 0.1,
}
SCALES = pytest.mark.parametrize("power_of_two_scales", [False, True], ids=["fp32", "ue8m0"])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("deepseek")
    write_exported(root, architecture=SIZES)
    return root / "final_model"


def cast_to_high_precision(folder: Path) -> dict[str, Tensor]:
    """Return what DeepSeek's conversion writes: it opens the index first, and finds each scale by it."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(weight_map.values())}
    tensors = {name: files[file][name] for name, file in weight_map.items()}
    return {
        name: weight_dequant(tensor, tensors[f"{name}_scale_inv"]) if tensor.element_size() == 1 else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }


def weight_dequant(weight_OI: Tensor, scale: Tensor, block_size: int = 128) -> Tensor:
    """Return the numbers times their block's scale, block by block."""
    assert scale.dtype == torch.float32, "the scale of DeepSeek's Linear is fp32, in V3.1 too"
    value_OI = torch.empty(weight_OI.shape)
    for top in range(0, weight_OI.shape[0], block_size):
        for left in range(0, weight_OI.shape[1], block_size):
            block = (slice(top, top + block_size), slice(left, left + block_size))
            value_OI[block] = weight_OI[block].float() * scale[top // block_size, left // block_size]
    return value_OI


@SCALES
def test_deepseeks_conversion_finds_the_weights_that_a_training_multiplied_by(model, tmp_path, power_of_two_scales):
    export_fp8(model, tmp_path / "fp8", power_of_two_scales)
    before, after = load_file(model / "model.safetensors"), cast_to_high_precision(tmp_path / "fp8")
    assert before.keys() == after.keys()
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    scaled = {name for name in before if f"{name}_scale_inv" in stored}
    assert len(scaled) > 20
    for name, tensor in before.items():
        expected = rounded_weight(tensor, power_of_two_scales) if name in scaled else tensor
        assert torch.equal(after[name], expected), name


def test_scales_that_are_powers_of_two_are_said_to_be_ue8m0_as_in_v3_1(model, tmp_path):
    export_fp8(model, tmp_path / "fp8", power_of_two_scales=True)
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    scales = [tensor for name, tensor in stored.items() if name.endswith("_scale_inv")]
    for scale in scales:
        assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
        assert torch.equal(scale.to(torch.float8_e8m0fnu).float(), scale)  # one byte would hold it
    quantization = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert quantization["scale_fmt"] == "ue8m0"
    export_fp8(model, tmp_path / "fp32")
    assert "scale_fmt" not in json.loads((tmp_path / "fp32" / "config.json").read_text())["quantization_config"]


@torch.no_grad()
@SCALES
@pytest.mark.filterwarnings("ignore")  # transformers' own, of a machine without an FP8 unit
def test_stock_transformers_computes_with_the_weights_that_a_training_multiplied_by(
    model, tmp_path, power_of_two_scales
):
    export_fp8(model, tmp_path / "fp8", power_of_two_scales)
    rounded = broken(model, tmp_path / "rounded", lambda tensors: cast_to_high_precision(tmp_path / "fp8"))
    ids = torch.arange(20)[None]
    expected = StockModel.from_pretrained(rounded).eval()(ids).logits
    loaded, info = StockModel.from_pretrained(tmp_path / "fp8", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)  # fp32 sums in another order
    exact = StockModel.from_pretrained(model).eval()(ids).logits
    assert not torch.allclose(exact, expected, atol=1e-3)

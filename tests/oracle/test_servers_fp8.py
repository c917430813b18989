"""Folders in FP8 against what vLLM and SGLang create and where they put our keys: tests/server_parameters.py."""

import json
import shutil

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockModel

from dsv3.export.fp8 import export_fp8
from dsv3.fp8.quantize import rounded_weight
from tests.exported_model import broken, edit_json, renamed, transposed, without, write_exported
from tests.server_keys import fits, stored
from tests.server_parameters import SERVERS

SIZES = {
    "hidden_size": 384,
    "num_attention_heads": 2,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
}
TOPOLOGIES = {
    "latents of 192 rows": {},
    "no query compression": {"q_lora_rank": None},
    "every matrix in whole blocks": {"qk_rope_head_dim": 128},
    "experts of 64": {"moe_intermediate_size": 64},
    "queries of 192 rows": {"q_lora_rank": 192, "kv_lora_rank": 192},
}


def exported_fp8(folder, **architecture):
    write_exported(folder, architecture={**SIZES, **architecture})
    export_fp8(folder / "final_model", folder / "fp8")
    return folder / "fp8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported_fp8(tmp_path_factory.mktemp("fp8"))


@pytest.mark.parametrize("architecture", TOPOLOGIES.values(), ids=TOPOLOGIES.keys())
def test_servers_find_the_fp8_matrices_with_their_scales_and_the_others_without(tmp_path, architecture):
    folder = exported_fp8(tmp_path, **architecture)
    for server in SERVERS:
        found, expected = fits(server, folder)
        assert found == expected, server
        assert any(kind == "F8_E4M3" for kind, _ in found.values())


def test_scales_that_are_powers_of_two_fit_the_same_places(folder, tmp_path):
    """As in V3.1: fp32 parameters, whose values `scale_fmt` describes."""
    export_fp8(folder.parent / "final_model", tmp_path / "ue8m0", power_of_two_scales=True)
    for server in SERVERS:
        found, expected = fits(server, tmp_path / "ue8m0")
        assert found == expected, server


BREAKAGES = {
    "scales absent": lambda tensors: without(tensors, "layers.1.self_attn.o_proj.weight_scale_inv"),
    "scales transposed": lambda tensors: transposed(tensors, "layers.1.self_attn.o_proj.weight_scale_inv"),
    "scales of other name": lambda tensors: renamed(tensors, "_scale_inv", "_scale"),
    "numbers of other type": lambda tensors: {
        key: tensor.bfloat16() if key.endswith("layers.1.self_attn.o_proj.weight") else tensor
        for key, tensor in tensors.items()
    },
}


@pytest.mark.parametrize("change", BREAKAGES.values(), ids=BREAKAGES.keys())
def test_a_broken_folder_fits_no_server(folder, tmp_path, change):
    target = broken(folder, tmp_path / "broken", change)
    assert all(
        found != expected for found, expected in (fits(server, target) for server in SERVERS if not server.drafts)
    )


@pytest.mark.parametrize("name", ["q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"])
def test_a_product_half_fp8_is_refused(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "half")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    kept = [module for module in quantization["modules_to_not_convert"] if module.rpartition(".")[2] != name]
    edit_json(tmp_path / "half" / "config.json", quantization_config={**quantization, "modules_to_not_convert": kept})
    refusals = 0
    for server in SERVERS:
        if name in ("q_a_proj", "kv_a_proj_with_mqa", server.latents):
            with pytest.raises(ValueError, match="is half FP8"):
                fits(server, tmp_path / "half")
            refusals += 1
    assert refusals


def test_the_configuration_says_how_the_numbers_are_to_be_read(folder):
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    expected = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    assert quantization.items() >= expected.items()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # transformers' own, of a machine without an FP8 unit
@pytest.mark.parametrize("name", ["latents of 192 rows", "experts of 64", "every matrix in whole blocks"])
def test_stock_transformers_reads_the_same_numbers_whatever_stayed_in_high_precision(tmp_path, name):
    architecture = {**TOPOLOGIES[name], "num_nextn_predict_layers": 0, "initializer_range": 0.1}
    folder = exported_fp8(tmp_path, **architecture)
    scaled = {key.removesuffix("_scale_inv") for key in stored(folder) if key.endswith("_scale_inv")}
    rounded = broken(
        tmp_path / "final_model",
        tmp_path / "rounded",
        lambda tensors: {key: rounded_weight(tensor) if key in scaled else tensor for key, tensor in tensors.items()},
    )
    ids = torch.arange(20)[None]
    expected = StockModel.from_pretrained(rounded).eval()(ids).logits
    loaded, info = StockModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)  # fp32 sums in another order

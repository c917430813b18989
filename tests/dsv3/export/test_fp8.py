import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsv3.artifacts import read_json
from dsv3.errors import UserError
from dsv3.export.fp8 import export_fp8
from dsv3.fp8.quantize import rounded_weight
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.committed import PROJECT

SIZES = {
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
}
PROGRAM = """
import sys, json, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(torch.arange(32)[None]).logits
print(json.dumps({"class": type(model).__module__, "logits": logits.tolist()}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[DeepseekV3ForCausalLM, Path, Path]:
    """Return a model, the folder it was saved to, and its FP8 export."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(**{**read_json(PROJECT / "mini_model/config_nano.json"), **SIZES})
    ).eval()
    root = tmp_path_factory.mktemp("export")
    model.save_pretrained(root / "model")
    export_fp8(root / "model", root / "fp8")
    return model, root / "model", root / "fp8"


def test_every_matrix_is_stored_in_fp8_with_its_scales_and_nothing_else_is(folders):
    _, source, exported = folders
    before, after = load_file(source / "model.safetensors"), load_file(exported / "model.safetensors")
    for key, tensor in before.items():
        is_kept = tensor.dim() != 2 or any(
            part in key for part in ("embed_tokens", "lm_head", "mlp.gate.", "kv_a_proj")
        )
        assert after[key].dtype == (tensor.dtype if is_kept else torch.float8_e4m3fn), key
        assert (f"{key}_scale_inv" in after) == (not is_kept), key
        if not is_kept:
            scales = after[f"{key}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            assert torch.equal(after[key].float() * scales, rounded_weight(tensor))


def test_the_configuration_names_what_is_not_quantized(folders):
    kept = read_json(folders[2] / "config.json")["quantization_config"]["modules_to_not_convert"]
    assert kept == ["lm_head", *(f"model.layers.{layer}.self_attn.kv_a_proj_with_mqa" for layer in (0, 1))]


def test_the_projection_of_a_prediction_module_is_named_as_kept(tmp_path):
    """It is stored as it is, and a loader converts what is not named."""
    sizes = {**read_json(PROJECT / "mini_model/config_nano.json"), **SIZES, "num_nextn_predict_layers": 2}
    DeepseekV3ForCausalLM(DeepseekV3Config(**sizes)).save_pretrained(tmp_path / "model")
    export_fp8(tmp_path / "model", tmp_path / "fp8")
    kept = read_json(tmp_path / "fp8/config.json")["quantization_config"]["modules_to_not_convert"]
    tensors = load_file(tmp_path / "fp8/model.safetensors")
    for name in ("model.layers.2.eh_proj", "model.layers.3.eh_proj"):
        assert name in kept and tensors[f"{name}.weight"].dtype == torch.float32
    assert "model.decoder.eh_proj" in kept, "as SGLang calls the first"


def test_stock_transformers_reads_the_export_as_the_model_with_rounded_weights(folders):
    model, _, exported = folders
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["class"] == "transformers.models.deepseek_v3.modeling_deepseek_v3"
    with torch.no_grad():
        exact = model(torch.arange(32)[None]).logits
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not any(
                part in name for part in ("embed", "lm_head", "gate.weight", "kv_a_proj")
            ):
                parameter.copy_(rounded_weight(parameter))
        rounded = model(torch.arange(32)[None]).logits
    assert torch.allclose(torch.tensor(answer["logits"]), rounded, atol=1e-5)
    assert not torch.allclose(exact, rounded, atol=1e-4)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no config.json"):
        export_fp8(tmp_path, tmp_path / "out")

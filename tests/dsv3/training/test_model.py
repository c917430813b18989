import json

from dsv3.training.model import build_model
from tests.training_inputs import MICRO


def test_a_configuration_of_fp8_weights_gives_a_model_that_does_not_claim_them(tmp_path):
    quantized = {**MICRO, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(quantized).encode())
    model = build_model(tmp_path / "config.json", seed=0)
    assert "quantization_config" not in model.config.to_dict()
    assert model.config.hidden_size == MICRO["hidden_size"]

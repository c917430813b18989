import json

import pytest

from dsv3.params.architecture import HARMLESS
from dsv3.training.model import build_model, read_config
from tests.training_inputs import MICRO


def test_a_configuration_of_fp8_weights_gives_a_model_that_does_not_claim_them(tmp_path):
    quantized = {**MICRO, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(quantized).encode())
    model = build_model(tmp_path / "config.json", seed=0)
    assert "quantization_config" not in model.config.to_dict()
    assert model.config.hidden_size == MICRO["hidden_size"]


@pytest.mark.parametrize("name", sorted(HARMLESS))
@pytest.mark.parametrize("value", [5, "nonsense", [5], {"own": 5}, True, False, None], ids=str)
def test_a_field_that_changes_nothing_reaches_no_model_whatever_its_value(tmp_path, name, value):
    """`qk_head_dim: 7` would be another scale of the softmax, `return_dict: false` other outputs."""
    (tmp_path / "plain.json").write_text(json.dumps(MICRO))
    (tmp_path / "config.json").write_text(json.dumps({**MICRO, name: value}))
    assert read_config(tmp_path / "config.json").to_dict() == read_config(tmp_path / "plain.json").to_dict()

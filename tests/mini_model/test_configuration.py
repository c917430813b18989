import json

import pytest
import torch

from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.committed import PROJECT

SHIPPED = sorted((PROJECT / "mini_model").glob("config*.json"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_group": 3}, "n_group is 3; must divide n_routed_experts (8)"),
        ({"n_group": 8, "topk_group": 8}, "n_group is 8; must be <= 4, half of n_routed_experts (8), or 1"),
        ({"topk_group": 5}, "topk_group is 5; must be <= n_group (4)"),
        (
            {"topk_group": 1, "num_experts_per_tok": 3},
            "num_experts_per_tok is 3; must be <= 2, the experts of topk_group (1) of n_group (4) groups of "
            "n_routed_experts (8)",
        ),
        ({"n_group": 0}, "n_group is 0; must be >= 1"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim is 3; must be a multiple of 2"),
        ({"attention_dropout": 1.5}, "attention_dropout is 1.5; must be < 1"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters.rope_type is 'llama3'; must be 'default' or 'linear' or 'dynamic' or 'yarn'",
        ),
    ],
)
def test_an_architecture_that_cannot_route_is_refused_in_one_line(micro_config, overrides, message):
    with pytest.raises(ValueError) as caught:
        micro_config(**overrides)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["n_routed_experts", "n_group", "topk_group", "num_experts_per_tok"])
def test_the_one_field_that_was_changed_is_named(micro_config, name):
    others = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    refused = 0
    for value in range(1, 20):
        try:
            micro_config(**{**others, name: value})
        except ValueError as error:
            refused += 1
            assert name in str(error), str(error)
    assert 0 < refused < 19


@pytest.mark.parametrize(("file", "parameters"), [("config.json", 5_691_664_384), ("config_tiny.json", 142_435_584)])
def test_the_headline_sizes_are_true_on_the_meta_device(file, parameters):
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config.from_json_file(PROJECT / "mini_model" / file))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_hold_what_the_class_reads_back(path):
    text = json.loads(path.read_text())
    config = DeepseekV3Config.from_pretrained(path)
    assert {name: getattr(config, name) for name in text if name not in ("architectures", "model_type")} == {
        name: value for name, value in text.items() if name not in ("architectures", "model_type")
    }


def test_deepseeks_own_spelling_of_yarn_is_understood(micro_config):
    rope_scaling = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    config = micro_config(rope_scaling=rope_scaling, rope_theta=10000, max_position_embeddings=163840)
    assert config.rope_parameters["rope_type"] == "yarn"
    # (0.1 ln 40 + 1)² of section 4.3's temperature, on 1 / sqrt(8 + 4)
    assert config.softmax_scale == pytest.approx(1.8738 * 12**-0.5, rel=1e-4)


def test_every_weight_starts_normal_with_the_configured_width_and_norms_at_one(micro_config):
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(micro_config(hidden_size=96, initializer_range=0.006, num_nextn_predict_layers=1))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            # The estimate of a standard deviation from n numbers errs by 1 / sqrt(2 n); 5 of those are allowed.
            tolerance = 5 / (2 * parameter.numel()) ** 0.5
            assert parameter.std().item() == pytest.approx(0.006, rel=tolerance), name
    assert all(not router.e_score_correction_bias.any() for _, router in model.routers())

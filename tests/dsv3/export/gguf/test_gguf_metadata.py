import pytest

from dsv3.errors import UserError
from dsv3.export.gguf.metadata import network_metadata
from mini_model.configuration_deepseek import DeepseekV3Config

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096}
REFUSED = {
    "an activation": ({"hidden_act": "gelu"}, "hidden_act is gelu; llama.cpp's deepseek2 computes silu only"),
    "biases": ({"attention_bias": True}, "attention_bias is True"),
    "an epsilon that the latents' norms lack": ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05; .* 1e-06 only"),
    "the layers of V2-Lite": ({"num_hidden_layers": 27}, "num_hidden_layers is 27; .* without q_lora_rank"),
    "YaRN's bounds": ({"rope_parameters": {**YARN, "beta_fast": 16.0}}, "rope_parameters.beta_fast is 16.0; .* 32.0"),
    "bounds between dimensions": (
        {"rope_parameters": {**YARN, "truncate": False}},
        "rope_parameters.truncate is False",
    ),
    "a factor that extends nothing": ({"rope_parameters": {**YARN, "factor": 1.0}}, "factor is 1.0; must be > 1"),
}


def described(**overrides):
    values = network_metadata(DeepseekV3Config(**overrides))
    return {name.removeprefix("deepseek2."): value for name, value in values.items()}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_llama_cpp_computes_otherwise_is_refused(overrides, message):
    with pytest.raises(UserError, match=f"^config.json: .*{message}"):
        described(**overrides)


def test_deepseeks_own_model_is_described_as_llama_cpps_converter_does():
    published = described(rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0})
    assert published["attention.key_length"] == 576
    assert published["attention.value_length"] == 512
    assert published["attention.key_length_mla"] == 192
    assert published["attention.value_length_mla"] == 128
    assert published["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    assert published["rope.scaling.attn_factor"] == 1.0
    assert (published["expert_group_count"], published["expert_group_used_count"]) == (8, 4)


def test_no_query_compression_is_the_number_zero():
    assert described(q_lora_rank=None, num_hidden_layers=27)["attention.q_lora_rank"] == 0


def test_groups_that_restrict_nothing_are_left_out():
    assert not [name for name in described(n_group=8, topk_group=8) if "group" in name]


def test_no_more_layers_are_dense_than_there_are():
    assert described(num_hidden_layers=2, first_k_dense_replace=3)["leading_dense_block_count"] == 2


def test_plain_positions_have_no_scaling():
    assert not [name for name in described() if "scaling" in name]

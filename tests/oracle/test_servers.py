"""Exported folders against what vLLM and SGLang create and where they put our keys: tests/server_parameters.py."""

import json
from pathlib import Path

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockModel

from dsv3.params.architecture import read_architecture
from dsv3.training.model import build_model
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.exported_model import broken, renamed, transposed, without, write_exported
from tests.server_keys import fits
from tests.server_parameters import FIELDS, SERVERS, SGLANG_NEXTN, VLLM_MTP, Server

# No two dimensions of a matrix are equal, so that a transposed one is seen.
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "intermediate_size": 32,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale_all_dim": 0.7,
}
TOPOLOGIES = {
    "one of everything": {},
    "no query compression, two shared experts": {"q_lora_rank": None, "n_shared_experts": 2},
    "no dense layer, two modules": {"first_k_dense_replace": 0, "num_nextn_predict_layers": 2},
    "two dense layers, tied, no module": {
        "first_k_dense_replace": 2,
        "tie_word_embeddings": True,
        "num_nextn_predict_layers": 0,
    },
    "dense trunk, tied, uncompressed queries, yarn": {
        "first_k_dense_replace": 3,
        "tie_word_embeddings": True,
        "q_lora_rank": None,
        "rope_parameters": YARN,
    },
    "two shared experts, tied, two modules": {
        "n_shared_experts": 2,
        "tie_word_embeddings": True,
        "num_nextn_predict_layers": 2,
    },
}


def exported(folder: Path, **architecture: object) -> Path:
    write_exported(folder, architecture={**SIZES, **architecture})
    return folder / "final_model"


def servers_of(architecture: dict) -> list[Server]:
    """Return the classes that can load the architecture: SGLang has no drafting with two modules."""
    depth = architecture.get("num_nextn_predict_layers", 1)
    fitting = {VLLM_MTP: depth > 0, SGLANG_NEXTN: depth == 1}
    return [server for server in SERVERS if fitting.get(server, True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("servers"))


@pytest.mark.parametrize("architecture", TOPOLOGIES.values(), ids=TOPOLOGIES.keys())
def test_servers_find_every_parameter_with_its_shape_and_no_key_is_left(tmp_path, architecture):
    folder = exported(tmp_path, **architecture)
    for server in servers_of(architecture):
        found, expected = fits(server, folder)
        assert found == expected, server


def test_without_shared_experts_servers_miss_nothing_but_matrices_without_elements(tmp_path):
    folder = exported(tmp_path, n_shared_experts=0)
    for server in SERVERS:
        found, expected = fits(server, folder)
        absent = {place: tensor for place, tensor in expected.items() if place not in found}
        assert found == {place: tensor for place, tensor in expected.items() if place not in absent}
        assert absent
        assert all(0 in shape for _, shape in absent.values())


BREAKAGES = {
    "a key renamed": lambda tensors: renamed(tensors, "layers.1.self_attn.kv_b_proj", "layers.1.self_attn.kv_b"),
    "experts stacked": lambda tensors: renamed(tensors, "layers.2.mlp.experts.3.down_proj.weight", "experts.down_proj"),
    "an expert absent": lambda tensors: without(tensors, "layers.1.mlp.experts.7.up_proj"),
    "a key too many": lambda tensors: {**tensors, "model.layers.1.mlp.gate.expert_load": torch.zeros(8)},
    "half a product": lambda tensors: without(tensors, "layers.0.self_attn.q_a_proj"),
    "a matrix transposed": lambda tensors: transposed(tensors, "layers.1.self_attn.o_proj"),
    "the balancing bias in bf16": lambda tensors: {
        key: tensor.bfloat16() if "correction_bias" in key else tensor for key, tensor in tensors.items()
    },
    "the head absent": lambda tensors: without(tensors, "lm_head"),
}
MTP_BREAKAGES = {
    "no norm of the embedding": (lambda tensors: without(tensors, "enorm"), {"vllm", "sglang"}),
    "the merging projection transposed": (lambda tensors: transposed(tensors, "eh_proj"), {"vllm", "sglang"}),
    "one layer too far": (lambda tensors: renamed(tensors, "layers.3.", "layers.4."), {"vllm", "sglang"}),
    "no copy of the embedding": (lambda tensors: without(tensors, "layers.3.embed_tokens"), {"vllm"}),
    "no copy of the head": (lambda tensors: without(tensors, "layers.3.shared_head.head"), {"vllm"}),
}


@pytest.mark.parametrize("change", BREAKAGES.values(), ids=BREAKAGES.keys())
def test_a_broken_trunk_fits_no_server(folder, tmp_path, change):
    target = broken(folder, tmp_path / "broken", change)
    assert all(
        found != expected for found, expected in (fits(server, target) for server in SERVERS if not server.drafts)
    )


@pytest.mark.parametrize(("change", "names"), MTP_BREAKAGES.values(), ids=MTP_BREAKAGES.keys())
def test_a_broken_mtp_module_fits_no_server_that_reads_it(folder, tmp_path, change, names):
    target = broken(folder, tmp_path / "broken", change)
    for server in (VLLM_MTP, SGLANG_NEXTN):
        found, expected = fits(server, target)
        assert (found != expected) == (server.name in names), server


def test_the_configuration_has_every_field_that_servers_read(folder):
    config = json.loads((folder / "config.json").read_text())
    assert [name for name in FIELDS.split() if name not in config] == []
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (config["topk_method"], config["scoring_func"], config["hidden_act"]) == ("noaux_tc", "sigmoid", "silu")


def test_rope_parameters_are_written_under_the_names_of_transformers_4_and_5_alike(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, None)
    config = json.loads((exported(tmp_path, rope_parameters=YARN) / "config.json").read_text())
    assert config["rope_parameters"] == YARN
    assert config["rope_theta"] == 50000.0
    assert config["rope_scaling"] == {name: value for name, value in YARN.items() if name != "rope_theta"}


@pytest.mark.parametrize("rope_parameters", [None, YARN], ids=["default", "yarn"])
def test_what_was_exported_can_be_the_model_config_of_another_training(tmp_path, rope_parameters):
    config = exported(tmp_path, rope_parameters=rope_parameters) / "config.json"
    assert read_architecture(config).rope_parameters == json.loads(config.read_text())["rope_parameters"]


@torch.no_grad()
@pytest.mark.parametrize("loader", [StockModel, DeepseekV3ForCausalLM], ids=["stock", "ours"])
def test_what_is_written_for_servers_changes_nothing_for_transformers(tmp_path, loader):
    architecture = {"tie_word_embeddings": True, "rope_parameters": YARN, "num_nextn_predict_layers": 0}
    folder = exported(tmp_path, **architecture)
    loaded, info = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.rope_parameters == YARN
    ids = torch.arange(40)[None]
    expected = build_model(tmp_path / "config.json", seed=0).eval()(ids).logits
    # fp32 sums of two implementations
    torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=1e-5, atol=1e-6)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from transformers import DeepseekV3ForCausalLM as StockModel

from dsv3.params.architecture import Architecture, read_architecture
from dsv3.sizing.parameters import (
    PARTS,
    mtp_parameters_by_part,
    num_active_parameters,
    num_mtp_parameters,
    num_parameters,
    num_router_biases,
    parameters_by_part,
)
from mini_model.configuration_deepseek import DeepseekV3Config as OurConfig
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM as OurModel
from tests.committed import PROJECT

CONFIGS = PROJECT / "mini_model"


@st.composite
def topologies(draw):
    """Any sizes whose group-limited routing holds."""
    groups = draw(st.sampled_from([1, 2, 4]))
    experts = groups * draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, groups))
    layers = draw(st.integers(1, 4))
    size = st.integers(1, 40)
    return {
        "vocab_size": draw(st.integers(1, 300)),
        "hidden_size": draw(size),
        "num_hidden_layers": layers,
        "num_attention_heads": draw(st.integers(1, 4)),
        "intermediate_size": draw(size),
        "moe_intermediate_size": draw(size),
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "n_routed_experts": experts,
        "n_shared_experts": draw(st.integers(1, 2)),
        "num_experts_per_tok": draw(st.integers(1, topk_group * experts // groups)),
        "n_group": groups,
        "topk_group": topk_group,
        "q_lora_rank": draw(st.none() | size),
        "kv_lora_rank": draw(size),
        "qk_nope_head_dim": draw(size),
        "qk_rope_head_dim": 2 * draw(st.integers(1, 8)),
        "v_head_dim": draw(size),
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
    }


def stock_model(sizes):
    with torch.device("meta"):
        return StockModel(DeepseekV3Config(**sizes, pad_token_id=None, bos_token_id=None, eos_token_id=None))


def part_of(name: str) -> str:
    """Where the formula counts the parameter called `name`."""
    found = [part for key, part in KEYS.items() if key in name]
    return found[0] if found else "dense_mlp"


KEYS = {
    "norm": "norms",
    "embed_tokens": "embedding",
    "lm_head": "head",
    "self_attn": "attention",
    "mlp.experts": "routed_experts",
    "mlp.shared_experts": "shared_experts",
    "mlp.gate.": "router",
}


@settings(max_examples=40, deadline=None)
@given(sizes=topologies())
def test_every_part_of_any_topology_has_as_many_parameters_as_stock_transformers_builds(sizes):
    architecture = Architecture(**sizes, num_nextn_predict_layers=0)
    model = stock_model(sizes)
    built = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        built[part_of(name)] += parameter.numel()
    assert parameters_by_part(architecture) == built
    assert num_parameters(architecture) == sum(parameter.numel() for parameter in model.parameters())
    biases = [buffer.numel() for name, buffer in model.named_buffers() if "e_score_correction_bias" in name]
    assert num_router_biases(architecture) == sum(biases)


@settings(max_examples=40, deadline=None)
@given(sizes=topologies(), num_mtp=st.integers(0, 2))
def test_our_model_of_any_topology_has_as_many_parameters_prediction_modules_included(sizes, num_mtp):
    sizes = sizes | {"num_nextn_predict_layers": num_mtp}
    with torch.device("meta"):
        model = OurModel(OurConfig(eos_token_id=0, **sizes))
    architecture = Architecture(**sizes)
    built = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters(architecture) + num_mtp_parameters(architecture) == built
    biases = [router.e_score_correction_bias.numel() for _, router in model.routers()]
    assert num_router_biases(architecture) == sum(biases)


@settings(max_examples=40, deadline=None)
@given(sizes=topologies())
def test_active_parameters_are_those_of_a_network_that_has_only_the_visited_experts(sizes):
    active = num_active_parameters(Architecture(**sizes, num_nextn_predict_layers=0))
    visited = sizes | {"n_routed_experts": sizes["num_experts_per_tok"], "n_group": 1, "topk_group": 1}
    smaller = Architecture(**visited, num_nextn_predict_layers=0)
    routers = sizes["hidden_size"] * (sizes["n_routed_experts"] - sizes["num_experts_per_tok"])
    assert active == num_parameters(smaller) + routers * smaller.num_moe_layers


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [("config.json", 5_691_664_384, 1_350_559_744), ("config_tiny.json", 142_435_584, 103_507_200)],
)
def test_mini_and_tiny_have_their_published_sizes_by_the_formula_and_on_the_meta_device(config, total, active):
    architecture = read_architecture(CONFIGS / config)
    assert (num_parameters(architecture), num_active_parameters(architecture)) == (total, active)
    with torch.device("meta"):
        model = OurModel(OurConfig.from_json_file(CONFIGS / config))
    assert sum(parameter.numel() for parameter in model.parameters()) == total


def test_nano_has_between_two_and_five_million_parameters():
    assert 2_000_000 <= num_parameters(read_architecture(CONFIGS / "config_nano.json")) <= 5_000_000


def test_an_mtp_module_is_a_block_a_projection_and_three_norms():
    tiny = read_architecture(CONFIGS / "config_tiny.json")
    one, two = (tiny.model_copy(update={"num_nextn_predict_layers": depth}) for depth in (1, 2))
    longer = tiny.model_copy(update={"num_hidden_layers": tiny.num_hidden_layers + 1})
    block = num_parameters(longer) - num_parameters(tiny)
    assert num_mtp_parameters(tiny) == 0
    assert num_mtp_parameters(one) == block + 2 * 768 * 768 + 3 * 768
    assert num_mtp_parameters(two) == 2 * num_mtp_parameters(one)
    assert num_parameters(two) == num_parameters(tiny)
    assert mtp_parameters_by_part(one)["projection"] == 2 * 768 * 768


def test_deepseek_v3_itself_comes_out_at_671_billion_and_37_billion_active():
    """Report, section 4.2, whose active parameters leave the embedding out; MTP: 11.5B (README_WEIGHTS)."""
    v3 = Architecture(
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        num_nextn_predict_layers=1,
    )
    assert round(num_parameters(v3) / 1e9) == 671
    assert round((num_active_parameters(v3) - parameters_by_part(v3)["embedding"]) / 1e9) == 37
    assert num_mtp_parameters(v3) / 1e9 == pytest.approx(11.5, rel=0.01)

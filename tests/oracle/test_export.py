"""The exported folder in other programs: stock transformers, remote code in another process, MtpModel."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockModel

from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "intermediate_size": 32,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM
ids = torch.tensor(json.loads(sys.argv[1]))
answers = []
for folder in sys.argv[2:]:
    for trust in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
        with torch.no_grad():
            logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        answers.append({"class": type(model).__module__, "logits": logits.tolist(), "tokens": tokens.tolist()})
print(json.dumps(answers))
"""


def build(**overrides):
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, **overrides})).eval()
    for _, router in model.routers():
        router.e_score_correction_bias.uniform_(-0.3, 0.3)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(SIZES["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with a MTP module and the folder it was exported to."""
    folder = tmp_path_factory.mktemp("final_model")
    model = build(num_nextn_predict_layers=1)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def stock_that_knows_where_the_module_lies(monkeypatch):
    """transformers 5.23 looks for MTP modules at layer 61 only, which is what its own class attribute says."""
    monkeypatch.setattr(StockModel, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2\..*"])
    return StockModel


@torch.no_grad()
def test_another_process_in_another_folder_gets_our_logits_with_and_without_our_code(exported, ids, tmp_path):
    folders, models = [], []
    for name, model in (("mtp", exported[0]), ("tied", build(tie_word_embeddings=True))):
        folders.append(tmp_path / name)
        models.append(model)
        model.save_pretrained(folders[-1])
    command = [sys.executable, "-c", PROGRAM, json.dumps(ids.tolist()), *map(str, folders)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    origins = ["transformers.", "transformers_modules."] * 2
    for answer, origin, model in zip(answers, origins, [models[0], models[0], models[1], models[1]], strict=True):
        assert answer["class"].startswith(origin)
        # the readable numbers of JSON are exact for fp32
        torch.testing.assert_close(torch.tensor(answer["logits"]), model(ids).logits, rtol=1e-5, atol=1e-5)
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert answer["tokens"] == expected.tolist()


def test_the_keys_and_shapes_are_deepseeks(exported):
    _, folder = exported
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    attention = {
        "self_attn.q_a_proj.weight": (14, 24),
        "self_attn.q_a_layernorm.weight": (14,),
        "self_attn.q_b_proj.weight": (3 * 12, 14),
        "self_attn.kv_a_proj_with_mqa.weight": (10 + 4, 24),
        "self_attn.kv_a_layernorm.weight": (10,),
        "self_attn.kv_b_proj.weight": (3 * 14, 10),
        "self_attn.o_proj.weight": (24, 18),
        "input_layernorm.weight": (24,),
        "post_attention_layernorm.weight": (24,),
    }
    networks = {"mlp.": 32}
    moe = {"mlp.shared_experts.": 12} | {f"mlp.experts.{expert}.": 12 for expert in range(8)}
    expected = {"model.embed_tokens.weight": (61, 24), "model.norm.weight": (24,), "lm_head.weight": (61, 24)}
    for layer in range(3):
        tensors = dict(attention)
        for prefix, width in (moe if layer else networks).items():
            tensors |= {f"{prefix}{name}_proj.weight": (width, 24) for name in ("gate", "up")}
            tensors[f"{prefix}down_proj.weight"] = (24, width)
        if layer:
            tensors |= {"mlp.gate.weight": (8, 24), "mlp.gate.e_score_correction_bias": (8,)}
        expected |= {f"model.layers.{layer}.{name}": shape for name, shape in tensors.items()}
    ahead = {"enorm.weight": (24,), "hnorm.weight": (24,), "eh_proj.weight": (24, 48), "shared_head.norm.weight": (24,)}
    ahead |= {"embed_tokens.weight": (61, 24), "shared_head.head.weight": (61, 24)}
    expected |= {f"model.layers.2.{name}": shape for name, shape in ahead.items()}
    assert shapes == expected


def test_the_copies_under_the_mtp_module_equal_their_originals(exported):
    model, folder = exported
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model.layers.2.embed_tokens.weight"), model.model.embed_tokens.weight)
        assert torch.equal(file.get_tensor("model.layers.2.shared_head.head.weight"), model.lm_head.weight)


def test_the_configuration_names_what_other_loaders_choose_their_code_by(exported):
    config = json.loads((exported[1] / "config.json").read_text())
    expected = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1,
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
    }
    assert {name: config[name] for name in expected} == expected


def test_our_class_loads_the_folder_whole_and_without_complaint(exported, ids):
    model, folder = exported
    loaded, info = DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    losses = [m.train()(ids, labels=ids, mtp_loss_weight=1.0).loss for m in (model, loaded)]
    assert torch.equal(*losses)
    model.eval()


def test_stock_transformers_ignores_the_mtp_module_if_it_knows_its_layer(
    exported, stock_that_knows_where_the_module_lies
):
    _, info = stock_that_knows_where_the_module_lies.from_pretrained(exported[1], output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@torch.no_grad()
@pytest.mark.parametrize("origin", ["ours", "stock"])
def test_stock_drafting_computes_what_training_computed(exported, ids, origin, stock_that_knows_where_the_module_lies):
    model, folder = exported
    loader = DeepseekV3ForCausalLM if origin == "ours" else stock_that_knows_where_the_module_lies
    main = loader.from_pretrained(folder).eval()
    drafting = MtpModel.from_pretrained(main).eval()
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    positions = torch.arange(1, ids.shape[1])[None]
    drafted = drafting.forward_layer(0, hidden, positions, None, input_ids=ids[:, 1:])
    trained = next(
        model.model.mtp_hidden_states(
            model.model(ids, use_cache=False).last_hidden_state, model.model.embed_tokens(ids)
        )
    )
    torch.testing.assert_close(drafted, trained, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("origin", ["ours", "stock"])
@pytest.mark.parametrize("depth", [1, 2])
def test_speculative_generation_equals_greedy(tmp_path, monkeypatch, origin, depth):
    build(num_nextn_predict_layers=depth).save_pretrained(tmp_path)
    monkeypatch.setattr(StockModel, "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.{k}\." for k in (2, 3)])
    model = (DeepseekV3ForCausalLM if origin == "ours" else StockModel).from_pretrained(tmp_path).eval()
    prompts = torch.randint(61, (50, 4), generator=torch.Generator().manual_seed(2))
    for prompt in prompts:
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        greedy = model.generate(prompt[None], **settings)
        assert torch.equal(model.generate(prompt[None], use_mtp=True, **settings), greedy)


@pytest.mark.parametrize("name", ["configuration_deepseek.py", "modeling_deepseek.py", "validation_deepseek.py"])
def test_the_shipped_files_are_copied_as_they_are_and_need_only_torch_and_transformers(exported, name):
    shipped = Path("mini_model", name).read_text(encoding="utf-8")
    assert (exported[1] / name).read_text(encoding="utf-8") == shipped
    imported = {
        (alias.name if isinstance(node, ast.Import) else "." * node.level + (node.module or "")).split(".torch")[0]
        for node in ast.walk(ast.parse(shipped))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    roots = {re.match(r"\.?\w+", module).group() for module in imported}
    shipped_too = {".configuration_deepseek", ".validation_deepseek"}
    assert roots <= {*sys.stdlib_module_names, *shipped_too, "torch", "transformers"}

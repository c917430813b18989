"""The GGUF file as a stranger reads it: keys, every weight, and logits computed from it alone."""

from contextlib import closing

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, MODEL_TENSORS, TENSOR_NAMES

from dsv3.data.tokenizer import read_tokenizer, save_trained, train_tokenizer
from dsv3.export.gguf.write import export_gguf
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.oracle.gguf_forward import GGUFModel
from tests.oracle.test_stock_transformers import SIZES as STOCK_SIZES
from tests.oracle.test_stock_transformers import TOPOLOGIES as STOCK_TOPOLOGIES
from tests.oracle.test_stock_transformers import YARN

TOLERANCE = 1e-5
"""Largest error of logits, relative to the largest: the oracle is float64, the model keeps 1e-7 and sums 100 terms."""
SIZES = {**STOCK_SIZES, "vocab_size": 288, "bos_token_id": 0, "eos_token_id": 0}
REFUSED = ("biased projections, other epsilon", "linear", "dynamic, past its length")
TOPOLOGIES = {
    **{name: sizes for name, sizes in STOCK_TOPOLOGIES.items() if name not in REFUSED},
    "no shared expert": {"n_shared_experts": 0},
    "one expert": {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
    "an MTP module": {"num_nextn_predict_layers": 1},
    "rope in halves, queries in one step": {"rope_interleave": False, "q_lora_rank": None},
    "yarn as DeepSeek's": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
    "yarn with mscale 1": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn with all dimensions scaled": {"rope_parameters": {**YARN, "mscale_all_dim": 1.0}},
}
TEXTS = ["To be, or not to be: that's the question. " * 9, "The king is dead; long live the king!\n\n" * 9]
ODD_TEXTS = [
    "To be",
    "  two spaces\n\n\tand tabs ",
    "I'll pay 1234.50, they've said",
    "naïve 🚀 我想",
    "<|endoftext|>x",
]

# Read in llama.cpp 0c1e57098: src/models/deepseek2.cpp (load_arch_hparams), src/llama-model.cpp (load_hparams) and
# src/llama-vocab.cpp (load). It refuses a file without these ...
REQUIRED = {
    "general.architecture",
    "deepseek2.context_length",
    "deepseek2.embedding_length",
    "deepseek2.block_count",
    "deepseek2.attention.layer_norm_rms_epsilon",
    "deepseek2.attention.q_lora_rank",
    "deepseek2.attention.kv_lora_rank",
    "deepseek2.expert_feed_forward_length",
    "deepseek2.expert_shared_count",
    "tokenizer.ggml.model",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
}
# ... and computes another model, or cuts text otherwise, without these.
DECISIVE = {
    "deepseek2.feed_forward_length",
    "deepseek2.leading_dense_block_count",
    "deepseek2.attention.head_count",
    "deepseek2.attention.head_count_kv",
    "deepseek2.attention.key_length",
    "deepseek2.attention.value_length",
    "deepseek2.attention.key_length_mla",
    "deepseek2.attention.value_length_mla",
    "deepseek2.expert_count",
    "deepseek2.expert_used_count",
    "deepseek2.expert_group_count",
    "deepseek2.expert_group_used_count",
    "deepseek2.expert_weights_scale",
    "deepseek2.expert_weights_norm",
    "deepseek2.expert_gating_func",
    "deepseek2.rope.dimension_count",
    "deepseek2.rope.freq_base",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.add_bos_token",
}


def export(folder, dtype="f32", **overrides):
    """A model with random weights, its folder, and its GGUF file."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, **overrides})).eval()
    for _, router in model.routers():
        router.e_score_correction_bias.uniform_(-0.3, 0.3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    save_trained(train_tokenizer(TEXTS, 272), folder / "model")
    model.save_pretrained(folder / "model")
    summary = export_gguf(folder / "model", folder / "model.gguf", dtype)
    assert ("without its MTP modules (1)" in summary) == bool(overrides.get("num_nextn_predict_layers"))
    return model, folder / "model.gguf"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return export(tmp_path_factory.mktemp("base"), num_nextn_predict_layers=1)


@pytest.fixture(scope="module", params=TOPOLOGIES.values(), ids=TOPOLOGIES.keys())
def pair(request, tmp_path_factory):
    return export(tmp_path_factory.mktemp("pair"), **request.param)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(SIZES["vocab_size"], (1, 24), generator=torch.Generator().manual_seed(1))


def test_logits_come_out_of_the_file_alone(pair, ids):
    model, path = pair
    with torch.no_grad():
        want = model(ids).logits[0].double().numpy()
    got = GGUFModel(path).logits(ids[0].numpy())
    assert abs(got - want).max() <= TOLERANCE * abs(want).max()


def test_every_weight_is_in_the_file_bit_for_bit_and_none_besides(pair):
    model, path = pair
    stored = {name: torch.from_numpy(tensor.copy()) for name, tensor in GGUFModel(path).stored.items()}
    assert sorted(stored) == sorted(expected_names(model.config))
    if not model.config.rope_interleave:
        pytest.skip("rows are reordered; the logits prove them")
    state = {name: tensor for name, tensor in model.state_dict().items() if not is_prediction_module(name, model)}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    rebuilt = rebuilt_state(stored, model.config)
    assert rebuilt.keys() == state.keys()
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in state.items())


def is_prediction_module(name, model):
    parts = name.split(".")
    return parts[1] == "layers" and int(parts[2]) >= model.config.num_hidden_layers


def expected_names(config):
    """What src/models/deepseek2.cpp asks for (load_arch_tensors), all of it required but the bias and the output."""
    names = ["token_embd.weight", "output_norm.weight", *([] if config.tie_word_embeddings else ["output.weight"])]
    queries = ["attn_q_a", "attn_q_a_norm", "attn_q_b"] if config.q_lora_rank else ["attn_q"]
    attention = ["attn_norm", *queries, "attn_kv_a_mqa", "attn_kv_a_norm", "attn_k_b", "attn_v_b", "attn_output"]
    for layer in range(config.num_hidden_layers):
        ffn = [f"ffn_{matrix}" for matrix in ("gate", "up", "down")]
        if layer >= config.first_k_dense_replace:
            ffn = ["ffn_gate_inp", *(f"{matrix}{kind}" for matrix in ffn for kind in ("_exps", "_shexp"))]
            names.append(f"blk.{layer}.exp_probs_b.bias")
        names += [f"blk.{layer}.{name}.weight" for name in (*attention, "ffn_norm", *ffn)]
    return names


def rebuilt_state(stored, config):
    """The model's own state dictionary, from the file: every transformation undone."""
    state = {
        "model.embed_tokens.weight": stored["token_embd.weight"],
        "model.norm.weight": stored["output_norm.weight"],
    }
    if "output.weight" in stored:
        state["lm_head.weight"] = stored["output.weight"]
    plain = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "self_attn.o_proj": "attn_output",
        "mlp.gate": "ffn_gate_inp",
        **{f"mlp.{matrix}_proj": f"ffn_{matrix}" for matrix in ("gate", "up", "down")},
    }
    if config.n_shared_experts:
        plain |= {f"mlp.shared_experts.{matrix}_proj": f"ffn_{matrix}_shexp" for matrix in ("gate", "up", "down")}
    for layer in range(config.num_hidden_layers):
        at, ours = f"blk.{layer}", f"model.layers.{layer}"
        for name, theirs in plain.items():
            if f"{at}.{theirs}.weight" in stored:
                state[f"{ours}.{name}.weight"] = stored[f"{at}.{theirs}.weight"]
        halves = [stored[f"{at}.attn_k_b.weight"].mT, stored[f"{at}.attn_v_b.weight"]]
        state[f"{ours}.self_attn.kv_b_proj.weight"] = torch.cat(halves, dim=1).flatten(0, 1)
        if layer >= config.first_k_dense_replace:
            state[f"{ours}.mlp.gate.e_score_correction_bias"] = stored[f"{at}.exp_probs_b.bias"]
            joined = [stored[f"{at}.ffn_{matrix}_exps.weight"] for matrix in ("gate", "up")]
            state[f"{ours}.mlp.experts.gate_up_proj"] = torch.cat(joined, dim=1)
            state[f"{ours}.mlp.experts.down_proj"] = stored[f"{at}.ffn_down_exps.weight"]
    return state


def test_a_missing_shared_expert_is_one_of_zeros(tmp_path):
    _, path = export(tmp_path, n_shared_experts=0)
    file = GGUFModel(path)
    assert file.get("expert_shared_count") == 1
    shared = {name: tensor for name, tensor in file.stored.items() if "shexp" in name}
    assert {tensor.shape for tensor in shared.values()} == {(12, 24), (24, 12)}
    assert not any(tensor.any() for tensor in shared.values())


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_matrices_are_rounded_and_vectors_and_routers_are_not(tmp_path, base, dtype):
    full, file = GGUFModel(base[1]), GGUFModel(export(tmp_path, dtype, num_nextn_predict_layers=1)[1])
    torch_dtype = torch.float16 if dtype == "f16" else torch.bfloat16
    for name, tensor in full.stored.items():
        is_kept = tensor.ndim == 1 or "ffn_gate_inp" in name
        assert file.types[name] == ("F32" if is_kept else dtype.upper()), name
        want = torch.from_numpy(tensor.copy())
        want = want if is_kept else want.to(torch_dtype).float()
        assert np.array_equal(file.stored[name], want.numpy()), name
    assert file.fields["general.file_type"] == {"f16": 1, "bf16": 32}[dtype]


def test_every_key_that_llama_cpp_needs_is_there_and_of_its_type(base):
    fields = GGUFModel(base[1]).fields
    assert fields.keys() >= REQUIRED | DECISIVE
    for name, value in fields.items():
        if name.startswith("deepseek2."):
            is_real = name.endswith(("epsilon", "freq_base", "weights_scale"))
            assert type(value) is (bool if name.endswith("norm") else float if is_real else int), name
    assert "deepseek2.nextn_predict_layers" not in fields
    assert fields["deepseek2.block_count"] == SIZES["num_hidden_layers"]


def test_names_are_those_of_the_architecture_in_ggufs_own_tables(base):
    known = {TENSOR_NAMES[kind] for kind in MODEL_TENSORS[MODEL_ARCH.DEEPSEEK2]}
    for name in GGUFModel(base[1]).stored:
        parts = name.rsplit(".", 1)[0].split(".")
        generic = ".".join(["blk", "{bid}", *parts[2:]]) if parts[0] == "blk" else parts[0]
        assert generic in known, name


def llama(path):
    """The file in llama.cpp itself, computing and caching in fp32; to be closed."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (it builds llama.cpp)")
    options = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0}
    return closing(llama_cpp.Llama(str(path), **options))


def test_llama_cpp_itself_computes_the_same_logits_and_tokens(pair, ids):
    model, path = pair
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        tokens = model.generate(ids, max_new_tokens=12, **options)
        want = model(tokens).logits[0].numpy()
    with llama(path) as other:
        greedy = other.generate(ids[0].tolist(), temp=0.0, repeat_penalty=1.0)
        assert [next(greedy) for _ in range(12)] == tokens[0, ids.shape[1] :].tolist()
        got = np.array(other.scores[: other.n_tokens])
    assert abs(got - want[: len(got)]).max() <= TOLERANCE * abs(want).max()


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_llama_cpp_itself_splits_texts_as_the_tokenizer_does(base, text):
    want = read_tokenizer(base[1].parent / "model").encode(text).ids
    with llama(base[1]) as other:
        assert other.tokenize(text.encode(), add_bos=False, special=False) == want
        assert other.tokenize(text.encode(), add_bos=True, special=False) == [0, *want]

"""The parameters that the classes of vLLM and SGLang create for a DeepSeek-V3 folder.

Read at these commits, of which nothing but names and shapes was taken:

    vllm-project/vllm    vllm/model_executor/models/deepseek_v2.py                       002d6073aa03
                         vllm/model_executor/models/deepseek_mtp.py                      03356f8cb59b
                         vllm/model_executor/model_loader/default_loader.py              00b5ad071262
                         vllm/transformers_utils/config.py                               0036026e7171
    sgl-project/sglang   python/sglang/srt/models/deepseek_v2.py                         3e4a39ee7330
                         python/sglang/srt/models/deepseek_nextn.py                      0114f9c923f2
                         .../models/deepseek_common/deepseek_weight_loader.py            0201c04e9838
                         .../layers/quantization/fp8.py                                  00563d368df9
                         .../layers/quantization/utils.py                                006d09616c51

Both multiply some of our matrices as one, so a parameter may have several parts; a part's place is its name there. They
differ in the name of the fused latent projections, and in the MTP modules: vLLM drafts with any number of them
and gives them an embedding and a head of its own, SGLang drafts with one and shares the trunk's. A folder fits a server
if what the keys fill (tests/server_keys.py) equals what the server created (here).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

BLOCK = 128
HIGH, LOW = "F32", "F8_E4M3"

Config = Mapping[str, Any]
Stored = tuple[str, tuple[int, ...]]
"""A tensor's type and shape."""
Places = dict[tuple[str, str], Stored]
"""(parameter, part of it) -> what lies there."""


@dataclass(frozen=True)
class Server:
    """One of the four model classes."""

    name: str
    latents: str
    """The product of `q_a_proj` and `kv_a_proj_with_mqa`, where queries are compressed."""
    drafts: bool
    """Whether this is the class of the MTP modules, which skips the trunk, or of the trunk, which skips them."""


VLLM = Server("vllm", "fused_qkv_a_proj", drafts=False)
VLLM_MTP = Server("vllm", "fused_qkv_a_proj", drafts=True)
SGLANG = Server("sglang", "fused_qkv_a_proj_with_mqa", drafts=False)
SGLANG_NEXTN = Server("sglang", "fused_qkv_a_proj_with_mqa", drafts=True)
SERVERS = (VLLM, VLLM_MTP, SGLANG, SGLANG_NEXTN)

FIELDS = (
    "architectures hidden_act hidden_size intermediate_size kv_lora_rank max_position_embeddings model_type "
    "moe_intermediate_size moe_layer_freq first_k_dense_replace n_group n_routed_experts n_shared_experts "
    "norm_topk_prob num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads "
    "num_nextn_predict_layers q_lora_rank qk_nope_head_dim qk_rope_head_dim rms_norm_eps rope_parameters rope_scaling "
    "rope_theta routed_scaling_factor scoring_func topk_group topk_method v_head_dim vocab_size"
)
"""What they read of config.json, as words: `rope_parameters` by vLLM and by SGLang on transformers 5, `rope_theta` and
`rope_scaling` by programs on transformers 4, whose configuration has no other names."""


def created(server: Server, config: Config) -> Places:
    """Return every parameter of the server's class, part by part, without those it takes over from another model."""
    first, width, vocabulary = config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
    places: Places = {}
    if not server.drafts:
        for index in range(first):
            has_experts = index >= config["first_k_dense_replace"] and index % config["moe_layer_freq"] == 0
            prefix = f"model.layers.{index}"
            places |= block(server, config, prefix, prefix, has_experts)
        return places | plain(
            {
                "model.embed_tokens.weight": (vocabulary, width),
                "model.norm.weight": (width,),
                "lm_head.weight": (vocabulary, width),
            }
        )
    for index in range(first, first + (config["num_nextn_predict_layers"] if server is VLLM_MTP else 1)):
        prefix = f"model.layers.{index}" if server is VLLM_MTP else "model"
        names = ("mtp_block", "") if server is VLLM_MTP else ("decoder", ".decoder")
        # vLLM's layer 61 of 61 has experts because 61 >= first_k_dense_replace; SGLang's module always has.
        places |= block(server, config, f"{prefix}.{names[0]}", f"{prefix}{names[1]}", has_experts=True)
        mtp_shapes = {f"{name}.weight": (width,) for name in ("enorm", "hnorm", "shared_head.norm")}
        mtp_shapes["eh_proj.weight"] = (width, 2 * width)
        if server is VLLM_MTP:
            mtp_shapes["shared_head.head.weight"] = (vocabulary, width)
            places |= plain({"model.embed_tokens.weight": (vocabulary, width)})
        places |= plain({f"{prefix}.{name}": shape for name, shape in mtp_shapes.items()})
    return places


def plain(shapes: Mapping[str, tuple[int, ...]]) -> Places:
    """Return undivided parameters of high precision."""
    return {(name, ""): (HIGH, shape) for name, shape in shapes.items()}


def block(server: Server, config: Config, prefix: str, module: str, has_experts: bool) -> Places:
    """Return a layer's parameters under `prefix`; `module` is what the quantization calls the layer."""
    places = plain({f"{prefix}.{name}": shape for name, shape in small_tensors(config, has_experts)})
    for name, parts in {**attention(server, config), **feed_forward(config, has_experts)}.items():
        is_stack = name.startswith("mlp.experts.")
        is_low = is_quantized(server, config, f"{module}.{'mlp.experts' if is_stack else name}", parts)
        weight = f"{prefix}.{name}{'_' if is_stack else '.'}weight"
        places |= {(weight, part): (LOW if is_low else HIGH, shape) for part, shape in parts.items()}
        if is_low:
            places |= {(f"{weight}_scale_inv", part): (HIGH, blocks(shape)) for part, shape in parts.items()}
    return places


def blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many blocks cover each dimension."""
    return tuple(-(-size // BLOCK) for size in shape)


def small_tensors(config: Config, has_experts: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield norms and router, which no server quantizes."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.weight", (config["hidden_size"],)
    yield "self_attn.kv_a_layernorm.weight", (config["kv_lora_rank"],)
    if config["q_lora_rank"] is not None:
        yield "self_attn.q_a_layernorm.weight", (config["q_lora_rank"],)
    if has_experts:
        yield "mlp.gate.weight", (config["n_routed_experts"], config["hidden_size"])
        if config["topk_method"] == "noaux_tc":
            yield "mlp.gate.e_score_correction_bias", (config["n_routed_experts"],)


def attention(server: Server, config: Config) -> dict[str, dict[str, tuple[int, int]]]:
    """Return the linear layers of an attention: name -> part -> shape."""
    width, heads, rank = config["hidden_size"], config["num_attention_heads"], config["q_lora_rank"]
    queries = heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    latents = (config["kv_lora_rank"] + config["qk_rope_head_dim"], width)
    layers = {
        "kv_b_proj": {"": (heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), config["kv_lora_rank"])},
        "o_proj": {"": (width, heads * config["v_head_dim"])},
    }
    if rank is None:
        layers |= {"q_proj": {"": (queries, width)}, "kv_a_proj_with_mqa": {"": latents}}
    else:
        layers |= {"q_b_proj": {"": (queries, rank)}}
        layers |= {server.latents: {"q_a_proj": (rank, width), "kv_a_proj_with_mqa": latents}}
    return {f"self_attn.{name}": parts for name, parts in layers.items()}


def feed_forward(config: Config, has_experts: bool) -> dict[str, dict[str, tuple[int, int]]]:
    """Return the linear layers of a feed-forward network; experts are stacked, `w13` and `w2`."""
    width, narrow, layers = config["hidden_size"], config["moe_intermediate_size"], {}
    inner = {"mlp": config["intermediate_size"]}
    if has_experts:
        # Zero shared experts are a network of width zero; only null would be none, and that transformers can't read.
        inner = (
            {} if config["n_shared_experts"] is None else {"mlp.shared_experts": narrow * config["n_shared_experts"]}
        )
        experts = range(config["n_routed_experts"])
        gates = {f"{expert}.{name}_proj": (narrow, width) for expert in experts for name in ("gate", "up")}
        layers["mlp.experts.w13"] = gates
        layers["mlp.experts.w2"] = {f"{expert}.down_proj": (width, narrow) for expert in experts}
    for name, size in inner.items():
        layers[f"{name}.gate_up_proj"] = {"gate_proj": (size, width), "up_proj": (size, width)}
        layers[f"{name}.down_proj"] = {"": (width, size)}
    return layers


def is_quantized(server: Server, config: Config, module: str, parts: Mapping[str, object]) -> bool:
    """Return whether the server builds this linear layer in FP8: `modules_to_not_convert` must name all or none of it.

    Classes that do not pass the fused modules to the quantization look for the fused module's own name.
    """
    if "quantization_config" not in config:
        return False
    ignored = config["quantization_config"]["modules_to_not_convert"]
    if module.endswith("mlp.experts") and server.name == "vllm":
        return not any(module in name for name in ignored)
    is_named = {module in ignored}
    if "" not in parts and not module.endswith("mlp.experts"):
        is_named |= {f"{module.rpartition('.')[0]}.{part}" in ignored for part in parts}
    if len(is_named) > 1:
        raise ValueError(f"{module} is half FP8")
    return not is_named.pop()

"""The sizes and switches of a DeepSeek-V3 network, under the names Hugging Face and DeepSeek use in `config.json`."""

import math
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from .validation_deepseek import MODEL_TYPE, VARIANT_TYPE, check_architecture, check_model_type, other_variants


class DeepseekV3Config(PreTrainedConfig):
    """Holds one architecture; defaults are the published 671B model's, apart from `num_nextn_predict_layers`.

    `rope_parameters` is `{"rope_type": "default", "rope_theta": 10000.0}` in pre-training; context extension replaces
    it by `{"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale_all_dim": 1.0, ...}`.

    Raises `ValueError`, in one line, for what `check_architecture` refuses.
    """

    model_type: ClassVar[str] = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = [  # a Trainer's predictions are the logits alone
        "past_key_values",
        "cross_entropy_loss",
        "mtp_loss",
        "sequence_loss",
    ]
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan: ClassVar[dict[str, Any] | None] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    attribute_map: ClassVar[dict[str, str]] = {
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",  # the name by which transformers' drafting asks for it
    }

    # the residual stream
    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"

    # multi-head latent attention
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None  # read by other tools only: MLA has one key and value per head
    q_lora_rank: int | None = 1536  # None: queries are projected in one step
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    attention_dropout: float = 0.0
    max_position_embeddings: int = 4096
    rope_parameters: dict[str, Any] | None = None
    rope_interleave: bool = True  # rotated pairs are adjacent, as in DeepSeek's weights

    # feed-forward networks: the first layers are dense, the rest mixtures of experts
    intermediate_size: int = 18432
    first_k_dense_replace: int = 3
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    scoring_func: str = "sigmoid"  # of these three, validation_deepseek.VARIANTS has the values
    topk_method: str = "noaux_tc"
    moe_layer_freq: int = 1

    # multi-token prediction
    num_nextn_predict_layers: int = 0

    # generation
    use_cache: bool = True
    output_router_logits: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_model_type(kwargs.pop("model_type", MODEL_TYPE))  # what is written follows from the variant
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.head_dim = self.qk_rope_head_dim  # the width that transformers' RoPE functions rotate
        super().__post_init__(**kwargs)
        check_architecture(self)

    def to_dict(self) -> dict[str, Any]:
        """Return what is written to config.json: a variant's under a `model_type` that no other loader computes."""
        return {**super().to_dict(), "model_type": VARIANT_TYPE if other_variants(self) else MODEL_TYPE}

    @property
    def softmax_scale(self) -> float:
        """The factor on query-key products: 1 / sqrt(width), times YaRN's mscale² if `mscale_all_dim` is set.

        DeepSeek's own code so scales both query and key of a head by mscale = 0.1 · mscale_all_dim · ln(factor) + 1.
        """
        rope = self.rope_parameters or {}
        is_scaled = rope.get("rope_type") == "yarn" and rope["factor"] > 1
        mscale = 0.1 * rope.get("mscale_all_dim", 0.0) * math.log(rope["factor"]) + 1.0 if is_scaled else 1.0
        return self.qk_head_dim**-0.5 * mscale**2


DeepseekV3Config.register_for_auto_class()

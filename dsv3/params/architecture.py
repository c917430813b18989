"""The architecture as its JSON file states it, read without torch.

The field names are Hugging Face's. `mini_model/configuration_deepseek.py` is the class that ships with the weights;
this one exists because importing that one imports torch, which three of the six stages must not.
"""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from dsv3.errors import UserError
from dsv3.params.section import one_line

GROUP_SCORE_TERMS = 2
"""A group is ranked by the sum of its two best experts, so it must hold at least two."""


class Architecture(BaseModel):
    """The sizes of a DeepSeek-V3 network; other keys of the JSON file are kept but not read."""

    model_config = ConfigDict(extra="allow", frozen=True)

    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    moe_intermediate_size: int = Field(ge=1)
    first_k_dense_replace: int = Field(ge=0)
    n_routed_experts: int = Field(ge=1)
    n_shared_experts: int = Field(ge=0)
    num_experts_per_tok: int = Field(ge=1)
    n_group: int = Field(ge=1)
    topk_group: int = Field(ge=1)
    q_lora_rank: int | None = Field(ge=1)
    kv_lora_rank: int = Field(ge=1)
    qk_nope_head_dim: int = Field(ge=1)
    qk_rope_head_dim: int = Field(ge=2, multiple_of=2)
    v_head_dim: int = Field(ge=1)
    max_position_embeddings: int = Field(ge=1)
    tie_word_embeddings: StrictBool
    num_nextn_predict_layers: int = Field(ge=0)
    num_key_value_heads: int | None = None
    attention_bias: bool = False
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    initializer_range: float = Field(default=0.02, ge=0)
    model_type: Literal["deepseek_v3"] = "deepseek_v3"
    rope_parameters: dict[str, Any] | None = None
    hidden_act: Literal["silu"] = "silu"
    """The activation that the expert backends compute; the model would compute others, with other experts."""

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Tell whether layer number `layer` holds experts; MTP modules, numbered on from the trunk, always do."""
        return layer >= min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with experts, MTP modules left out."""
        return max(0, self.num_hidden_layers - self.first_k_dense_replace)

    @model_validator(mode="after")
    def heads_and_positions_hold(self) -> Self:
        """Check what transformers accepts, then ignores or fails on."""
        heads = self.num_key_value_heads
        if heads not in (None, self.num_attention_heads):
            raise ValueError(
                f"num_key_value_heads is {heads}; must be num_attention_heads ({self.num_attention_heads}): "
                "every head has a key and a value of its own"
            )
        rope = self.rope_parameters or {}
        ignored = {"rope_theta", "rope_scaling"} & set(self.model_extra or {})
        if rope and ignored:
            raise ValueError(f"{min(ignored)} would be ignored beside rope_parameters; state it there")
        factor = rope.get("factor")
        if rope.get("rope_type") == "yarn" and not (isinstance(factor, (int, float)) and factor >= 1):
            raise ValueError(f"rope_parameters.factor is {json.dumps(factor)}; must be >= 1 for rope_type yarn")
        return self

    @model_validator(mode="after")
    def topology_holds(self) -> Self:
        """Check that group-limited routing can choose its experts: transformers accepts, then fails or misroutes."""
        experts, groups = self.n_routed_experts, self.n_group
        if experts % groups:
            raise ValueError(f"n_group is {groups}; must divide n_routed_experts ({experts})")
        if groups > 1 and experts // groups < GROUP_SCORE_TERMS:
            raise ValueError(
                f"n_group is {groups}; leaves {experts // groups} experts per group, must leave at least 2"
            )
        if self.topk_group > groups:
            raise ValueError(f"topk_group is {self.topk_group}; must be at most n_group ({groups})")
        reachable = self.topk_group * (experts // groups)
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; topk_group lets a token reach only {reachable}"
            )
        return self


def read_architecture(path: Path) -> Architecture:
    """Return the architecture stored at `path`; raise `UserError` in one line for a file that is missing or wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"model.config: {path} can't be read ({error.strerror}); name one of mini_model/config*.json"
        ) from None
    try:
        return Architecture.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except ValidationError as error:
        raise UserError(f"{path}: {one_line(error.errors()[0])}") from None

"""The architecture as its JSON file states it, read without torch.

The field names are Hugging Face's. `mini_model/configuration_deepseek.py` is the class that ships with the weights;
this one exists because that one imports torch, which three of the six stages must not. Both are checked by
`mini_model/validation_deepseek.py`; this one adds the types, which the shipped class leaves to transformers.
"""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, StrictBool, ValidationError, model_validator

from dsv3.errors import UserError
from dsv3.params.section import error_line
from dsv3.params.text import read_small_text
from mini_model.validation_deepseek import check_architecture


class Architecture(BaseModel):
    """The sizes of a DeepSeek-V3 network; other keys of the JSON file are kept, for the checks that read them."""

    model_config = ConfigDict(extra="allow", frozen=True)

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: StrictBool
    num_nextn_predict_layers: int
    num_key_value_heads: int | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    model_type: Literal["deepseek_v3"] = "deepseek_v3"
    rope_parameters: dict[str, Any] | None = None
    hidden_act: Literal["silu"] = "silu"
    """The activation that the expert backends compute; the model would compute others, with other experts."""

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Return whether layer number `layer` holds experts; MTP modules, numbered on from the trunk, always do."""
        return layer >= min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with experts, MTP modules left out."""
        return max(0, self.num_hidden_layers - self.first_k_dense_replace)

    @model_validator(mode="after")
    def can_work(self) -> Self:
        """Check the model's own rules, and that nothing in the file would be ignored."""
        check_architecture(self)
        ignored = {"rope_theta", "rope_scaling"} & set(self.model_extra or {})
        if self.rope_parameters and ignored:
            raise ValueError(f"{min(ignored)} would be ignored beside rope_parameters; state it there")
        return self


def read_architecture(path: Path) -> Architecture:
    """Return the architecture stored at `path`; raise `UserError` in one line for a file that is missing or wrong."""
    try:
        text = read_small_text(path)
    except OSError as error:
        raise UserError(
            f"model.config: {path} can't be read ({error.strerror}); name one of mini_model/config*.json"
        ) from None
    try:
        return Architecture.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except ValidationError as error:
        raise UserError(f"{path}: {error_line(error.errors()[0])}") from None
    except RecursionError:
        raise UserError(f"{path}: not JSON that can be read (it is nested too deeply)") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise UserError(f"{path}: not JSON that can be read ({str(error).split(';')[0]})") from None

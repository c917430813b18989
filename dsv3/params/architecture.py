"""The architecture as its JSON file states it, read without torch.

The field names are Hugging Face's. `mini_model/configuration_deepseek.py` is the class that ships with the weights;
this one exists because that one imports torch, which download, tokenize and estimate_size must not. Both are checked by
`mini_model/validation_deepseek.py`; this one adds the types, which the shipped class leaves to transformers.
"""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dsv3.errors import UserError
from dsv3.params.section import error_line, suggestion, value_text
from dsv3.params.text import read_small_text
from mini_model.validation_deepseek import ROPE_BOUNDS, check_architecture

HARMLESS = frozenset(
    {
        # written by transformers: what made the file, and what its generation and outputs do
        *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
        *("_attn_implementation", "chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id"),
        *("output_attentions", "output_hidden_states", "problem_type", "return_dict", "use_return_dict"),
        # derived from other fields
        *("head_dim", "qk_head_dim"),
        # DeepSeek's own: how it was trained, and how its weights were stored
        *("aux_loss_alpha", "ep_size", "pretraining_tp", "quantization_config", "seq_aux"),
    }
)
"""Fields of published config.json files that change nothing here. Every other one is used, or refused."""

ROPE_FIELDS = frozenset({"rope_type", "type", "truncate", "partial_rotary_factor", *ROPE_BOUNDS})


class Architecture(BaseModel):
    """A DeepSeek-V3 network: every field of its JSON file that the model uses, and none that it does not know.

    Types are strict: nothing is converted but a whole number where a fraction may stand.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

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
    tie_word_embeddings: bool
    num_nextn_predict_layers: int
    num_key_value_heads: int | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    moe_layer_freq: int = 1
    rope_parameters: dict[str, Any] | None = None
    rope_interleave: bool = True
    model_type: Literal["deepseek_v3", "deepseek_v3_variant"] = "deepseek_v3"
    hidden_act: Literal["silu"] = "silu"
    """The activation that the expert backends compute; the model would compute others, with other experts."""
    use_cache: bool = True
    output_router_logits: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

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

    @model_validator(mode="before")
    @classmethod
    def uses_every_field(cls, fields: Any) -> Any:
        """Refuse a field that would be ignored; write early spellings of rotary positions as `rope_parameters`."""
        fields = _with_rope_parameters(fields) if isinstance(fields, dict) else fields
        for name in sorted(set(fields) - set(cls.model_fields) - HARMLESS):
            raise ValueError(f"{name} is no field of this architecture{suggestion(name, cls.model_fields)}")
        for name in sorted(set(fields) & HARMLESS):
            if not _is_json(fields[name]):
                value = json.dumps(fields[name])
                raise ValueError(f"{name} is {value:.60}; must be finite numbers and whole characters; leave it out")
        return fields

    @model_validator(mode="after")
    def can_work(self) -> Self:
        """Check the model's own rules."""
        rope = self.rope_parameters or {}
        for name in sorted(set(rope) - ROPE_FIELDS):
            raise ValueError(f"rope_parameters.{name} is no field of it{suggestion(name, ROPE_FIELDS)}")
        partial = rope.get("partial_rotary_factor", 1)
        if partial != 1 or isinstance(partial, bool):
            raise ValueError(
                f"rope_parameters.partial_rotary_factor is {value_text(partial)}; must be 1: "
                "qk_rope_head_dim is the part that is rotated"
            )
        check_architecture(self)
        return self


def _is_json(value: Any) -> bool:
    """Return whether a value can be written as JSON: no NaN, no infinity, no half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return False
    return True


def _with_rope_parameters(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with `rope_theta` and `rope_scaling`, the early spelling, as `rope_parameters`.

    Raises `ValueError` where both spellings are there and differ.
    """
    early = {name: fields[name] for name in ("rope_scaling", "rope_theta") if fields.get(name) is not None}
    fields = {name: value for name, value in fields.items() if name not in ("rope_scaling", "rope_theta")}
    if not early:
        return fields
    scaling = early.get("rope_scaling", {})
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling is {value_text(scaling)}; must be an object or null")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    theta = {"rope_theta": early["rope_theta"]} if "rope_theta" in early else {}
    translated = {**scaling, **theta, "rope_type": rope_type}
    stated = fields.get("rope_parameters") or translated
    if translated != stated:  # an exported model's config.json has both spellings of the same
        raise ValueError(f"{max(early)} says something else than rope_parameters, and would be ignored; leave it out")
    return {**fields, "rope_parameters": stated}


def read_architecture(path: Path) -> Architecture:
    """Return the architecture stored at `path`; raise `UserError` in one line for a file that is missing or wrong."""
    fields = _read_fields(path)
    try:
        return Architecture.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{path}: {error_line(error.errors()[0])}") from None


def _read_fields(path: Path) -> dict[str, Any]:
    """Return the object that the JSON file at `path` holds."""
    try:
        fields = json.loads(read_small_text(path), object_pairs_hook=_without_repetition)
    except OSError as error:
        raise UserError(
            f"model.config: {path} can't be read ({error.strerror}); name one of mini_model/config*.json"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{path}: not JSON that can be read (it is nested too deeply)") from None
    except ValueError as error:  # a repeated field, an integer of more digits than Python reads
        raise UserError(f"{path}: not JSON that can be read ({str(error).split(';')[0]})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds {value_text(fields)}; must hold an object, as config.json does")
    return fields


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise `ValueError` where it states a field twice."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name} is stated twice")
        fields[name] = value
    return fields

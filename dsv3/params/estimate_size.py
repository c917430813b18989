"""Section `estimate_size`: parameters of the stage of that name."""

from typing import Literal

from pydantic import Field

from dsv3.params.section import Section


class EstimateSizeParams(Section):
    """Section `estimate_size`: the workload whose memory and arithmetic are estimated."""

    context_tokens: int = Field(ge=1)
    """Context length of the inference estimate."""

    inference_dtype: Literal["fp32", "bf16", "fp8"]
    """Type of the weights at inference."""

    kv_cache_dtype: Literal["fp32", "bf16"]
    """Type of the cached latent at inference."""

    memory_budget_gib: float | None = Field(gt=0)
    """estimate_size refuses a training whose estimate exceeds this; null: no bound."""

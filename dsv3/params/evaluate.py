"""Section `evaluate`: parameters of the stage of that name."""

from pydantic import Field

from dsv3.params.section import Section


class EvaluateParams(Section):
    """Section `evaluate`: how the splits are scored."""

    per_device_eval_batch_size: int = Field(ge=1)
    """Windows in one forward pass."""

    block_size: int = Field(ge=2)
    """Tokens the model sees at once."""

    stride: int = Field(ge=1)
    """Tokens by which the window moves on; each token is scored once, with at least block_size - stride before it."""

    cross_document_attention: bool
    """True: documents in one window see the ones before; false: each sees itself only, whatever the training did."""

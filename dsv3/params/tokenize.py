"""Section `tokenize`: parameters of the stage of that name."""

from typing import Literal

from pydantic import Field

from dsv3.params.section import Section


class TokenizeParams(Section):
    """Section `tokenize`: how the text becomes tokens and splits."""

    tokenizer: str = Field(min_length=1)
    """`byte_level_bpe` trains one on the training split; else a folder or Hub id of a pretrained one."""

    vocab_size: int = Field(ge=257)
    """Size of the trained vocabulary: 256 bytes, merges, and the end-of-text token."""

    split_by: Literal["characters", "documents"]
    """characters: cut the whole text at fractions of its length; documents: deal whole documents."""

    validation_fraction: float = Field(gt=0, lt=0.5)
    """Share of the text kept for validation."""

    test_fraction: float = Field(gt=0, lt=0.5)
    """Share of the text kept for testing."""

    shard_tokens: int = Field(ge=1)
    """Most tokens in one shard file."""

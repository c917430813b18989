"""Parameters of `download` and `tokenize`."""

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from dsv3.section import Section


class DataParams(Section):
    """Section `data`: where the text comes from."""

    source: Literal["auto", "tiny_shakespeare", "plays", "file", "hub"]
    """auto: the exact tiny Shakespeare where it can be reached, else plays."""

    path: str | None
    """For source `file`: a file, a folder or a glob of text, jsonl, parquet or csv."""

    text_field: str = Field(min_length=1)
    """Name of the column that holds the text (jsonl, parquet, csv, hub)."""

    hub_id: str | None
    """For source `hub`: the data set's id, such as `roneneldan/TinyStories`."""

    hub_config_name: str | None
    """For source `hub`: the data set's configuration."""

    hub_revision: str | None
    """For source `hub`: the commit, branch or tag that is read."""

    hub_split: str = Field(min_length=1)
    """For source `hub`: the split that is read; our own splits are cut from it."""

    timeout_s: float = Field(gt=0)
    """Longest wait for a connection or for the next bytes, in seconds."""

    @model_validator(mode="after")
    def names_its_source(self) -> Self:
        """A source that needs a path or an id must have one."""
        if self.source == "file" and not self.path:
            raise ValueError("path is empty; source 'file' needs a file, a folder or a glob")
        if self.source == "hub" and not self.hub_id:
            raise ValueError("hub_id is empty; source 'hub' needs a data set's id")
        return self


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

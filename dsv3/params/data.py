"""Section `data`: parameters of `download`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Self

from pydantic import Field, model_validator

from dsv3.params.section import OneOf, Section

REQUIRED_KEY: Mapping[str, str | None] = MappingProxyType(
    {"auto": None, "tiny_shakespeare": None, "plays": None, "file": "path", "hub": "hub_id"}
)
"""Each source, and the key that must be set for it. `dsv3.data.sources.SOURCES` says what a source does."""


class DataParams(Section):
    """Section `data`: where the text comes from."""

    source: Annotated[str, OneOf(REQUIRED_KEY)]
    """auto: the exact tiny Shakespeare where it can be reached, else plays."""

    path: str | None
    """For source `file`: a file, a folder or a glob of text, jsonl, json, parquet, csv or tsv, also compressed."""

    text_field: str = Field(min_length=1)
    """Name of the column that holds the text (jsonl, json, parquet, csv, tsv, hub)."""

    hub_id: str | None
    """For source `hub`: the data set's id, such as `roneneldan/TinyStories`."""

    hub_config_name: str | None
    """For source `hub`: the data set's configuration."""

    hub_revision: str | None
    """For source `hub`: the commit, branch or tag that is read."""

    hub_split: str = Field(min_length=1)
    """For source `hub`: the split that is read; our own splits are cut from it."""

    timeout_s: float = Field(gt=0, le=3600)
    """Longest wait for a connection or for the next bytes, in seconds; who is silent for an hour is not there."""

    @model_validator(mode="after")
    def has_the_key_of_its_source(self) -> Self:
        """Check that the key which the source needs is set."""
        key = REQUIRED_KEY[self.source]
        if key and not getattr(self, key):
            raise ValueError(f"{key} is empty; source '{self.source}' needs it")
        return self

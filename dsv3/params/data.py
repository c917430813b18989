"""Section `data`: parameters of `download`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dsv3.params.section import Section


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

"""Section `model`: which architecture."""

from pydantic import Field

from dsv3.params.section import Section


class ModelParams(Section):
    """Section `model`: which architecture."""

    config: str = Field(min_length=1)
    """A JSON file with Hugging Face's field names."""

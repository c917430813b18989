"""The base class of every section of params.yaml."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen, closed set of parameters. No field has a default: every value stands in params.yaml."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

"""The base class of every section of params.yaml, a type for names from a table, and the line about a wrong value."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, field_validator
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, PydanticKnownError, core_schema


class Section(BaseModel):
    """A frozen, closed set of parameters. No field has a default: every value stands in params.yaml.

    Types are strict: nothing is converted but a whole number where a fraction may stand (`learning_rate: 1`).
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @field_validator("*")
    @classmethod
    def can_be_used(cls, value: Any) -> Any:
        """Refuse a whole number that no array can count to, and a text that no system takes for a name."""
        if isinstance(value, int) and value >= 2**63:
            raise PydanticKnownError("less_than", {"lt": 2**63})
        return usable_name(value) if isinstance(value, str) else value


def usable_name(value: str) -> str:
    """Return a text; refuse one that no system takes for a name."""
    if "\0" in value or len(value) > MAX_NAME:
        raise PydanticCustomError("name", "must have at most {most} characters, none of them NUL", {"most": MAX_NAME})
    return value


MAX_NAME = 4096
"""Characters of the longest path that Linux takes."""


class OneOf:
    """Annotates a text that must be one of the names of a table: `Annotated[str, OneOf(TABLE)]`.

    It is refused in the same words as a value of a `Literal`, and is an enum in the JSON schema.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.literal_schema(list(self.names))


BOUNDS = {
    "greater_than": ("gt", "must be >"),
    "greater_than_equal": ("ge", "must be >="),
    "less_than": ("lt", "must be <"),
    "less_than_equal": ("le", "must be <="),
    "multiple_of": ("multiple_of", "must be a multiple of"),
    "literal_error": ("expected", "must be one of"),
}
"""Type of pydantic's error -> where it keeps the bound, and the words before it."""


def error_line(error: ErrorDetails) -> str:
    """Return a pydantic error as `where is value; bound`."""
    where = ".".join(str(part)[:60] for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where} is no parameter"
    if error["type"] == "missing":
        return f"{where} is missing; every parameter must be stated"
    if error["type"] in BOUNDS:
        key, words = BOUNDS[error["type"]]
        bound = error.get("ctx", {})[key]
        return f"{where} is {value_text(error['input'])}; {words} {f'{bound:g}' if isinstance(bound, float) else bound}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        names_field = re.match(r"\w+ (is|must|would) ", message)
        return f"{where}{'.' if where and names_field else ': ' if where else ''}{message}"
    return f"{where} is {value_text(error['input'])}; {message[0].lower()}{message[1:]}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean …?` for the closest of the known names, or nothing."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def value_text(value: Any) -> str:
    """Return a value as YAML writes it, shortened."""
    try:
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:
        text = "a number of more digits than Python writes"
    return text if len(text) <= 60 else text[:57] + "..."

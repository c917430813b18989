"""Whether two folders hold the same tokenizer, told from their files alone."""

import json
from pathlib import Path
from typing import Any

from dsv3.artifacts import read_regular, sha256_file
from dsv3.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
ID_PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer")
"""What in tokenizer.json decides the ids; other programs write the rest anew."""


def has_another_tokenizer(folder: Path, tokens: Path) -> bool:
    """Return whether `folder`, a model's, has a tokenizer, and another one than the token data: ids mean other words.

    Raises `UserError` for a file that is no tokenizer.
    """
    own, other = folder / TOKENIZER_FILE, tokens / "tokenizer" / TOKENIZER_FILE
    return own.is_file() and sha256_file(own) != sha256_file(other) and id_parts(own) != id_parts(other)


def id_parts(file: Path) -> list[Any]:
    """Return what in a tokenizer.json decides the ids."""
    try:
        content = json.loads(read_regular(file))
        return [content.get(part) for part in ID_PARTS]
    except (ValueError, RecursionError, AttributeError):
        raise UserError(f"{file}: is no tokenizer") from None

"""The tokenizer as llama.cpp reads it: tokens, their types, merges, and the name of the pre-tokenizer.

llama.cpp has its own code for every pre-tokenizer and finds it by name (`tokenizer.ggml.pre`). A tokenizer of
`dsv3.data.tokenizer` splits text as GPT-2's does. A tokenizer of the user's is recognized by its patterns, and refused
where llama.cpp would split differently.
"""

import json
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer

from dsv3.data.tokenizer import TOKENIZER_FILE, num_ids, read_tokenizer, special_tokens
from dsv3.errors import UserError

PRE_TOKENIZERS = {
    (): "gpt-2",
    (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    ): "deepseek-v3",
}
"""Patterns by which text is split -> llama.cpp's name; without any, the byte-level encoder splits as GPT-2 does."""


def vocabulary_metadata(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Return the keys of the tokenizer in `folder` for an embedding of `vocab_size` rows, of which it may need fewer.

    A document begins with bos in training and in `sample`, so `add_bos_token` is true.

    Raises `UserError` for a tokenizer that llama.cpp would apply differently.
    """
    tokenizer = read_tokenizer(folder)
    path = folder / TOKENIZER_FILE
    if num_ids(tokenizer) > vocab_size:
        raise UserError(f"{path}: needs {num_ids(tokenizer)} rows; vocab_size in config.json is {vocab_size}")
    file: dict[str, Any] = json.loads(tokenizer.to_str())
    pre = pre_tokenizer_name(file, path)
    if not file["model"]["merges"]:
        raise UserError(f"{path}: has no merges; llama.cpp reads no tokenizer without one; raise tokenize.vocab_size")
    tokens, types = token_list(tokenizer, vocab_size)
    special = special_tokens(tokenizer, folder)
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in file["model"]["merges"]],
        "bos_token_id": special.bos_token_id,
        "eos_token_id": special.eos_token_id,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def token_list(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of each of `vocab_size` ids; an id without a token is `[PAD<id>]`, unused."""
    texts = [f"[PAD{token_id}]" for token_id in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    added = tokenizer.get_added_tokens_decoder()
    for text, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        texts[token_id] = text
        types[token_id] = int(TokenType.NORMAL)
        if token_id in added:
            types[token_id] = int(TokenType.CONTROL if added[token_id].special else TokenType.USER_DEFINED)
    return texts, types


def pre_tokenizer_name(file: dict[str, Any], path: Path) -> str:
    """Return llama.cpp's name of the tokenizer's pre-tokenizer; `UserError` if it has none."""
    steps = flattened(file["pre_tokenizer"], "pretokenizers")
    patterns = tuple(step.get("pattern", {}).get("Regex", step["type"]) for step in steps[:-1])
    encoder = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": not patterns}
    is_known = (
        file["model"]["type"] == "BPE"
        and not flattened(file["normalizer"], "normalizers")
        and bool(steps)
        and encoder.items() <= steps[-1].items()
        and all(step.get("behavior") == "Isolated" for step in steps[:-1])
    )
    if not is_known or patterns not in PRE_TOKENIZERS:
        raise UserError(
            f"{path}: splits text by {[step['type'] for step in steps]}, which llama.cpp does not have in this form; "
            f"must be a byte-level BPE that splits text as one of {', '.join(PRE_TOKENIZERS.values())} does"
        )
    return PRE_TOKENIZERS[patterns]


def flattened(step: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """Return the steps of a sequence in tokenizer.json; a single one as a list, none as an empty list."""
    if step is None:
        return []
    return step[members] if step["type"] == "Sequence" else [step]

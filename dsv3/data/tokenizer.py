"""The tokenizer: a byte-level BPE trained on the training split, or a pretrained one.

Byte-level BPE starts from the 256 bytes, so it can encode any text and decodes it exactly; merges of frequent pairs
are added until the vocabulary is full. Id 0 is `<|endoftext|>`, which stands before every document. The
folder that is written (`tokenizer.json`, `tokenizer_config.json`) is what `transformers.AutoTokenizer` loads.
"""

import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer

from dsv3.artifacts import read_regular, sha256_file, write_json
from dsv3.data.files import local_path
from dsv3.data.tokenizer_files import TOKENIZER_FILE
from dsv3.data.words import repeated, word_counts
from dsv3.errors import UserError, one_line

END_OF_TEXT = "<|endoftext|>"
CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
MODEL_CONFIG_FILE = "config.json"
WRITTEN_FILES = (TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE)
"""All that a tokenizer's folder holds; the last one where a tokenizer was brought with it."""
BROUGHT_FILES = (TOKENIZER_FILE, CONFIG_FILE, MAP_FILE, TEMPLATE_FILE, MODEL_CONFIG_FILE)
"""Files of a pretrained tokenizer that are read where they exist; the model's names its class, like the tokenizer's."""
REMEDY = "bring another, or run the tokenize stage again"
MIN_FREQUENCY = 2
"""A merge that occurs once saves one token and costs an entry."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids around a document: bos before it, and eos behind it where that is another token."""

    bos_token_id: int
    eos_token_id: int


def train_tokenizer(texts: Iterable[str], vocab_size: int, shows_bar: bool = False) -> Tokenizer:
    """Return a byte-level BPE of at most `vocab_size` tokens trained on `texts`; deterministic.

    With `shows_bar`, a terminal is shown the trainer's progress.
    """
    tokenizer, byte_level = Tokenizer(BPE()), ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=shows_bar and sys.stderr.isatty(),
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()  # words are counted already, and hold no white space in this alphabet
    tokenizer.train_from_iterator(repeated(word_counts(texts, byte_level)), trainer)
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, ByteLevelDecoder()
    return tokenizer


def splits_at_word_borders(tokenizer: Tokenizer) -> bool:
    """Return whether no token crosses a border of `dsv3.data.words`, and a text's tokens are always the same.

    It is known of a byte-level BPE with GPT-2's rule, without normalization, dropout or added tokens in plain text.
    """
    stated = json.loads(tokenizer.to_str())
    model, rule = stated["model"], stated["pre_tokenizer"] or {}
    return (
        stated["normalizer"] is None
        and (rule.get("type"), rule.get("add_prefix_space"), rule.get("use_regex")) == ("ByteLevel", False, True)
        and (stated["decoder"] or {}).get("type") == "ByteLevel"
        and (model.get("type"), model.get("dropout")) == ("BPE", None)
        and all(token["special"] for token in stated["added_tokens"])
    )


def save_trained(tokenizer: Tokenizer, directory: Path) -> None:
    """Write a tokenizer of `train_tokenizer` as transformers loads it."""
    directory.mkdir()
    tokenizer.save(str(directory / TOKENIZER_FILE))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,  # it would alter the text in decoding
    }
    write_json(directory / CONFIG_FILE, config)


def copy_pretrained(name: str, directory: Path) -> None:
    """Write a pretrained tokenizer (a folder, or a Hub id) to `directory`; `UserError` if there is none.

    Its configuration is completed: it names the special tokens, whichever file or class named them before, and a class
    that takes tokenizer.json as it is, so that every reader gives the ids of the shards.
    """
    place = local_path(name)
    found = {file: place / file for file in BROUGHT_FILES} if place.is_dir() else _from_hub(name)
    found = {file: source for file, source in found.items() if source.is_file()}
    if TOKENIZER_FILE not in found:
        raise UserError(f"tokenize.tokenizer is {name}; it has no {TOKENIZER_FILE}")
    directory.mkdir()
    for file in (TOKENIZER_FILE, TEMPLATE_FILE):
        if file in found:
            shutil.copyfile(found[file], directory / file)
    named, stated = (_json_object(found[file]) if file in found else {} for file in (MAP_FILE, CONFIG_FILE))
    config = named | {key: value for key, value in stated.items() if value is not None}
    if not config.get("eos_token"):
        config = _tokens_of_class(found) | config
    config.pop("auto_map", None)  # code that does not come along
    config = {key: _content(value) if key.endswith("_token") else value for key, value in config.items()}
    write_json(directory / CONFIG_FILE, config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    try:
        special_tokens(read_tokenizer(directory), directory)
        check_loads(directory)
    except UserError as error:
        raise UserError(str(error).replace(str(directory), name)) from None  # the place that the user knows


def check_loads(directory: Path) -> None:
    """Raise `UserError` where transformers, by which a model's users read and write, can't use the tokenizer."""
    from transformers import AutoTokenizer  # imports torch; only a tokenizer that is brought is checked

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        tokenizer.decode(tokenizer("a")["input_ids"])
    except Exception as error:  # of any type, by what is wrong
        raise UserError(f"{directory}: transformers can't use it ({one_line(error)[:200]}); {REMEDY}") from None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_regular(path, "utf-8-sig"))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is not JSON; {REMEDY}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is no JSON object; {REMEDY}")
    return value


def _tokens_of_class(found: dict[str, Path]) -> dict[str, Any]:
    """Return the special tokens that transformers knows for the tokenizer's class; none for a class it doesn't know."""
    from transformers import AutoTokenizer  # imports torch; only a tokenizer that names no eos needs it

    with TemporaryDirectory() as folder:
        for file, source in found.items():
            try:
                text = read_regular(source, "utf-8-sig")  # transformers reads no byte order mark
            except ValueError:
                raise UserError(f"{source}: is not UTF-8; {REMEDY}") from None
            Path(folder, file).write_text(text, encoding="utf-8")
        try:
            return dict(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).special_tokens_map)
        except Exception:  # whatever is wrong with it: special_tokens tells that no eos is named
            return {}


def _from_hub(name: str) -> dict[str, Path]:
    """Return the local paths of those of the tokenizer's files that the Hub has."""
    import httpx2  # what huggingface_hub's own errors derive from; only this case needs the two
    from huggingface_hub import HfApi, hf_hub_download

    try:
        # One request first: a download would retry an unreachable Hub.
        files = {sibling.rfilename for sibling in HfApi().model_info(name, timeout=10).siblings or []}
        return {file: Path(hf_hub_download(name, file)) for file in BROUGHT_FILES if file in files}
    except (httpx2.HTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"tokenize.tokenizer is {name}; no such folder, and {TOKENIZER_FILE} can't be read from the Hub ({reason})"
        ) from None


def read_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer in `directory`, which reads `<|endoftext|>` in a text as plain characters."""
    try:
        tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"{directory / TOKENIZER_FILE}: is no tokenizer ({error})") from None
    if not tokenizer.get_vocab_size(with_added_tokens=True):
        raise UserError(f"{directory / TOKENIZER_FILE}: has no tokens; {REMEDY}")
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def special_tokens(tokenizer: Tokenizer, directory: Path) -> SpecialTokens:
    """Return the ids of bos and eos as tokenizer_config.json names them; without a bos, eos serves as both."""
    path = directory / CONFIG_FILE
    config = _json_object(path)
    for name, value in config.items():
        if wanted := _wanted(name, value):
            raise UserError(f"{path}: {name} is {str(value)[:50]}; must be {wanted}; {REMEDY}")
    eos = _token_id(tokenizer, config.get("eos_token"))
    if eos is None:
        raise UserError(
            f"{path}: names no eos_token that the tokenizer knows; documents could not be separated; {REMEDY}"
        )
    bos = _token_id(tokenizer, config.get("bos_token"))
    return SpecialTokens(eos if bos is None else bos, eos)


def _wanted(name: str, value: Any) -> str:
    """Return what a field of tokenizer_config.json must be, where transformers fails later; empty if it is that."""
    if name.endswith("_token") and not name.startswith("add_") and not isinstance(value, str | None):
        return "a text"
    if name == "model_max_length" and (isinstance(value, bool) or not isinstance(value, int | float)):
        return "a number"
    return ""


def check_tokenizer(directory: Path, sha256: str, special: SpecialTokens) -> None:
    """Raise `UserError` unless `directory` holds the tokenizer of these facts, which a token folder's meta.json states.

    A training exports it: another one would spell the model's tokens as other words.
    """
    path, remedy = directory / TOKENIZER_FILE, "run the tokenize stage again"
    if not path.is_file() or not (directory / CONFIG_FILE).is_file():
        raise UserError(f"{directory}: lacks {TOKENIZER_FILE} or {CONFIG_FILE}; {remedy}")
    if sha256_file(path) != sha256:
        raise UserError(f"{path}: is not the tokenizer that was written (SHA-256 in meta.json); {remedy}")
    if special_tokens(read_tokenizer(directory), directory) != special:
        raise UserError(f"{directory / CONFIG_FILE}: names other special tokens than meta.json; {remedy}")


def _token_id(tokenizer: Tokenizer, token: Any) -> int | None:
    """Return the id of a token that a configuration states as a string, or as an object with `content`."""
    content = _content(token)
    return tokenizer.token_to_id(content) if content and isinstance(content, str) else None


def _content(token: Any) -> Any:
    """Return the text of a token that is stated as an object, which transformers reads from some files only."""
    return token.get("content") if isinstance(token, dict) else token


def num_ids(tokenizer: Tokenizer) -> int:
    """Return the size of the embedding that the tokenizer needs: its largest id + 1, added tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

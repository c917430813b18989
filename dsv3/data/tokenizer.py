"""The tokenizer: a byte-level BPE trained on the training split, or a pretrained one.

Byte-level BPE starts from the 256 bytes, so it can encode any text and decodes it exactly; merges of frequent pairs
are added until the vocabulary is full. Id 0 is `<|endoftext|>`, which stands before every document. The
folder that is written (`tokenizer.json`, `tokenizer_config.json`) is what `transformers.AutoTokenizer` loads.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from dsv3.artifacts import write_json
from dsv3.errors import UserError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MIN_FREQUENCY = 2
"""A merge that occurs once saves one token and costs an entry."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids around a document: bos before it, and eos behind it where that is another token."""

    bos_token_id: int
    eos_token_id: int


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of at most `vocab_size` tokens trained on `texts`; deterministic."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


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
    """Copy the files of a pretrained tokenizer (a folder, or a Hub id) to `directory`; `UserError` if there is none."""
    directory.mkdir()
    for file in (TOKENIZER_FILE, CONFIG_FILE):
        source = Path(name, file) if Path(name).is_dir() else _from_hub(name, file)
        if not source.is_file():
            raise UserError(f"tokenize.tokenizer is {name}; it has no {file}")
        shutil.copyfile(source, directory / file)


def _from_hub(name: str, file: str) -> Path:
    """Return the local path of a file that was downloaded from the Hub."""
    import httpx2  # what huggingface_hub's own errors derive from; only this case needs the two
    from huggingface_hub import HfApi, hf_hub_download

    try:
        HfApi().model_info(name, timeout=10)  # one request: the download itself would retry an unreachable Hub
        return Path(hf_hub_download(name, file))
    except (httpx2.HTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"tokenize.tokenizer is {name}; no such folder, and {file} can't be read from the Hub ({reason})"
        ) from None


def read_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer in `directory`, which reads `<|endoftext|>` in a text as plain characters."""
    try:
        tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"{directory / TOKENIZER_FILE}: is no tokenizer ({error})") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def special_tokens(tokenizer: Tokenizer, directory: Path) -> SpecialTokens:
    """Return the ids of bos and eos as tokenizer_config.json names them; without a bos, eos serves as both."""
    path = directory / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: is not JSON") from None
    eos = _token_id(tokenizer, config.get("eos_token"))
    if eos is None:
        raise UserError(f"{path}: names no eos_token that the tokenizer knows; documents could not be separated")
    bos = _token_id(tokenizer, config.get("bos_token"))
    return SpecialTokens(eos if bos is None else bos, eos)


def _token_id(tokenizer: Tokenizer, token: str | dict[str, Any] | None) -> int | None:
    """Return the id of a token that a configuration states as a string, or as an object with `content`."""
    content = token["content"] if isinstance(token, dict) else token
    return tokenizer.token_to_id(content) if content else None


def num_ids(tokenizer: Tokenizer) -> int:
    """Return the size of the embedding that the tokenizer needs: its largest id + 1, added tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

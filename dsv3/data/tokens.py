"""From a corpus folder to a folder of token shards, with the numbers that describe it."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv3.artifacts import Contents, replacing_directory, sha256_file, sha256_lines, write_json
from dsv3.data.corpus import Chunk, Measure, check_data_file, read_chunks, read_measure
from dsv3.data.encoding import Encoded, encode_groups, groups, pieces
from dsv3.data.shards import token_dtype, write_shards
from dsv3.data.splits import Selector, split_selectors
from dsv3.data.tokenizer import (
    TOKENIZER_FILE,
    SpecialTokens,
    copy_pretrained,
    num_ids,
    read_tokenizer,
    save_trained,
    special_tokens,
    train_tokenizer,
)
from dsv3.errors import UserError
from dsv3.params.tokenize import TokenizeParams
from dsv3.progress import ProgressMode, shown_progress

TRAINED = "byte_level_bpe"
METRICS_BEGINNING = re.compile(rb'\{\s*"vocab_size": \d+,\s*"vocabulary_used": ')
"""What the metrics begin with, as JSON."""

TOKEN_FILES = Contents("meta.json", ("tokenizer", "train_*.bin", "validation_*.bin", "test_*.bin"))
"""All that a token folder may hold."""

ONE_PROCESS_CHARACTERS = 64_000_000
"""Up to here one process with threads is faster than starting others."""
UPDATES_OF_A_PASS = 100
"""Most states that one pass over the corpus shows, however many documents it has."""

Count = Callable[[int, str], None]
"""Takes characters that were read, and what for."""


@dataclass
class SplitStatistics:
    """Size of one split and frequency of each token, counted while it is written."""

    vocab_size: int
    corpus_characters: int
    tokens: int = 0
    characters: int = 0
    bytes: int = 0
    documents: int = 0
    round_trip_exact: bool = True
    frequencies: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.frequencies = np.zeros(self.vocab_size, np.int64)

    def count(self, encoded_parts: Iterable[Encoded]) -> Iterator[npt.NDArray[np.unsignedinteger]]:
        """Yield the tokens of the parts and count them."""
        for part in encoded_parts:
            self.tokens += len(part.tokens)
            self.characters += part.characters
            self.bytes += part.bytes
            self.documents += part.documents
            self.round_trip_exact &= part.round_trip_exact
            self.frequencies += np.bincount(part.tokens, minlength=self.vocab_size)
            yield part.tokens


def tokens_summary(corpus: Path, params: TokenizeParams) -> str:
    """Return in one line what `write_tokens` would do; raise `UserError` where the corpus does not allow it."""
    source, measure = read_measure(corpus)
    split_selectors(measure, params)
    trained = f"a byte-level BPE of {params.vocab_size} tokens, trained on the training split"
    name = trained if params.tokenizer == TRAINED else params.tokenizer
    return f"{measure.characters:,} characters of {source}, split by {params.split_by}, encoded by {name}"


def write_tokens(
    corpus: Path, output: Path, params: TokenizeParams, vocabulary_limit: int, mode: ProgressMode = ProgressMode.none
) -> dict[str, Any]:
    """Write the token folder `output` whole and return its metrics; show the progress as `mode` says.

    `vocabulary_limit` is the model's vocabulary size. Raises `UserError`, and leaves nothing, for a tokenizer that
    can't be read or is larger, and for a corpus that is damaged or gives an empty split.
    """
    source, measure = read_measure(corpus)
    check_data_file(corpus, measure)
    selectors = split_selectors(measure, params)
    passes = len(selectors) + (params.tokenizer == TRAINED)
    with (
        replacing_directory(output, TOKEN_FILES) as directory,
        counted_characters(mode, passes * measure.characters) as count,
    ):
        folder = directory / "tokenizer"
        chunks = _chunks(corpus, measure, selectors["train"], count, "training the tokenizer")
        _write_tokenizer(folder, params, chunks, shows_bar=mode in (ProgressMode.auto, ProgressMode.bar))
        tokenizer = read_tokenizer(folder)
        vocab_size, special = num_ids(tokenizer), special_tokens(tokenizer, folder)
        if vocab_size > vocabulary_limit:
            raise UserError(
                f"tokenize.tokenizer is {params.tokenizer} with {vocab_size} tokens; must be <= {vocabulary_limit}, "
                "the model's vocab_size"
            )
        statistics: dict[str, SplitStatistics] = {}
        shards: dict[str, dict[str, str]] = {}
        for split, selector in selectors.items():
            statistics[split] = SplitStatistics(vocab_size, measure.characters)
            chunks = _chunks(corpus, measure, selector, count, f"encoding {split}")
            paths = _write_split(directory, split, chunks, statistics[split], params.shard_tokens)
            shards[split] = {path.name: sha256_file(path) for path in paths}
            if not statistics[split].tokens:
                raise UserError(f"the {split} split is empty: {measure.num_documents} documents are too few to split")
        write_json(directory / "meta.json", _meta(folder, (source, measure.sha256), special, statistics, shards))
    return _metrics(statistics, vocab_size)


@contextmanager
def counted_characters(mode: ProgressMode, total: int) -> Iterator[Count]:
    """Yield a function of further characters, and what they are read for, that shows how many of `total` there are."""
    done = 0
    with shown_progress(mode, "tokenize", total, "character") as progress:

        def count(characters: int, purpose: str) -> None:
            nonlocal done
            done += characters
            progress.update(done, {"now": purpose})

        yield count


def _meta(
    folder: Path,
    corpus: tuple[str, str],
    special: SpecialTokens,
    statistics: Mapping[str, SplitStatistics],
    shards: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """Return the content of meta.json; `folder` is the tokenizer's, `corpus` its source and SHA-256."""
    vocab_size = statistics["train"].vocab_size
    return {
        "vocab_size": vocab_size,
        "bos_token_id": special.bos_token_id,
        "eos_token_id": special.eos_token_id,
        "dtype": token_dtype(vocab_size).name,
        "tokenizer_sha256": sha256_file(folder / TOKENIZER_FILE),
        "sha256": sha256_lines({name: digest for digests in shards.values() for name, digest in digests.items()}),
        "corpus": {"source": corpus[0], "sha256": corpus[1]},
        "splits": {split: {**_sizes(counted), "shards": shards[split]} for split, counted in statistics.items()},
    }


def _write_tokenizer(folder: Path, params: TokenizeParams, chunks: Iterable[Chunk], shows_bar: bool) -> None:
    """Train a tokenizer on the training split or copy a pretrained one."""
    if params.tokenizer == TRAINED:
        # In the pieces that are encoded later, so the trainer sees the same words.
        texts = (piece.text for piece in pieces(chunks))
        save_trained(train_tokenizer(texts, params.vocab_size, shows_bar), folder)
    else:
        copy_pretrained(params.tokenizer, folder)


def _chunks(corpus: Path, measure: Measure, selector: Selector, count: Count, purpose: str) -> Iterator[Chunk]:
    """Yield the chunks of one split, and count the characters of the corpus as they are read for the `purpose`."""
    told = read = 0
    at_once = max(1, measure.characters // UPDATES_OF_A_PASS)

    def watched() -> Iterator[Chunk]:
        nonlocal told, read
        for chunk in read_chunks(corpus, measure):
            yield chunk
            read += len(chunk.text)
            if read - told >= at_once:
                count(read - told, purpose)
                told = read

    yield from selector(watched())
    if told < measure.characters:
        count(measure.characters - told, purpose)


def _write_split(
    directory: Path, split: str, chunks: Iterable[Chunk], statistics: SplitStatistics, shard_tokens: int
) -> list[Path]:
    """Encode and write one split, fill in its `statistics`, return the shards."""
    dtype, num_processes = token_dtype(statistics.vocab_size), _num_processes(statistics.corpus_characters)
    encoded = encode_groups(groups(pieces(chunks)), directory / "tokenizer", dtype, num_processes)
    return write_shards(directory, split, statistics.count(encoded), dtype, shard_tokens)


def _num_processes(characters: int) -> int:
    """Return how many processes encode a corpus of this size."""
    if characters <= ONE_PROCESS_CHARACTERS:
        return 1
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _sizes(counted: SplitStatistics) -> dict[str, int]:
    """Return the size of one split."""
    return {
        "tokens": counted.tokens,
        "characters": counted.characters,
        "bytes": counted.bytes,
        "documents": counted.documents,
    }


def _metrics(statistics: dict[str, SplitStatistics], vocab_size: int) -> dict[str, Any]:
    """Return the metrics of the stage."""
    tokens = sum(counted.tokens for counted in statistics.values())
    characters = sum(counted.characters for counted in statistics.values())
    return {
        "vocab_size": vocab_size,
        "vocabulary_used": float(np.count_nonzero(statistics["train"].frequencies) / vocab_size),
        "characters_per_token": characters / tokens,
        "round_trip_exact": all(counted.round_trip_exact for counted in statistics.values()),
        **{
            split: _sizes(counted) | {"characters_per_token": counted.characters / counted.tokens}
            for split, counted in statistics.items()
        },
    }

"""What a token folder says of itself, and whether its shards are that.

meta.json lists every shard with its SHA-256. Only listed shards are opened, and each is compared with its digest, and
its largest id with the vocabulary, once before a training or an evaluation: a shard that was changed, swapped or added
would train or score another text in silence.
"""

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dsv3.artifacts import CHUNK_BYTES, open_regular, read_model, sha256_lines
from dsv3.data.shards import DTYPES, HEADER, TokenStream
from dsv3.errors import UserError

REMEDY = "run the tokenize stage again"
Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Content(BaseModel):
    """A strict, closed record."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SplitMeta(Content):
    """Size of one split, and its shards in order."""

    tokens: Count
    characters: Count
    bytes: Count
    documents: Count
    shards: dict[str, Sha256] = Field(min_length=1)


class CorpusMeta(Content):
    """The text that was tokenized."""

    source: str
    sha256: str


class TokenMeta(Content):
    """The content of meta.json."""

    vocab_size: Annotated[int, Field(ge=1)]
    bos_token_id: Count
    eos_token_id: Count
    dtype: Literal["uint16", "uint32"]
    tokenizer_sha256: Sha256
    sha256: Sha256
    corpus: CorpusMeta
    splits: dict[Literal["train", "validation", "test"], SplitMeta] = Field(min_length=3)

    @model_validator(mode="after")
    def is_consistent(self) -> Self:
        """Check what one value says of another."""
        if max(self.bos_token_id, self.eos_token_id) >= self.vocab_size:
            raise ValueError(f"a special token is beyond vocab_size, {self.vocab_size}")
        digests: dict[str, str] = {}
        for split, sizes in self.splits.items():
            if list(sizes.shards) != [f"{split}_{index:05d}.bin" for index in range(len(sizes.shards))]:
                raise ValueError(f"the shards of {split} are not {split}_00000.bin and so on")
            digests |= sizes.shards
        if sha256_lines(digests) != self.sha256:
            raise ValueError("sha256 is not that of the shards")
        return self


def read_meta(tokens: Path) -> TokenMeta:
    """Return what the folder `tokens` says of itself; raise `UserError` where that is damaged or missing."""
    if not (tokens / "meta.json").is_file():
        raise UserError(f"{tokens / 'meta.json'}: no such file; run dvc repro tokenize")
    return read_model(tokens / "meta.json", TokenMeta, REMEDY)


def open_stream(tokens: Path, meta: TokenMeta, split: Literal["train", "validation", "test"]) -> TokenStream:
    """Return the stream of a split over the shards that `meta` lists; `UserError` where they have other sizes."""
    for path in sorted(tokens.glob("*.bin")):
        if not any(path.name in sizes.shards for sizes in meta.splits.values()):
            raise UserError(f"{path}: is not named by meta.json; remove it, or {REMEDY}")
    stream = TokenStream([tokens / name for name in meta.splits[split].shards])
    if len(stream) != meta.splits[split].tokens:
        raise UserError(
            f"{tokens}: {split} has {len(stream)} tokens where meta.json says {meta.splits[split].tokens}; {REMEDY}"
        )
    return stream


def check_shards(tokens: Path, meta: TokenMeta, splits: Iterable[Literal["train", "validation", "test"]]) -> str:
    """Return a line on the shards of `splits`; raise `UserError` where one is not as it was written.

    Every byte is read once, in pieces.
    """
    start, num_bytes, num_shards = time.perf_counter(), 0, 0
    for split in splits:
        for name, sha256 in meta.splits[split].shards.items():
            digest, largest, size = digest_and_largest(tokens / name, DTYPES[np.dtype(meta.dtype).itemsize])
            if digest != sha256:
                raise UserError(f"{tokens / name}: is not the shard that was written (SHA-256 in meta.json); {REMEDY}")
            if largest >= meta.vocab_size:
                raise UserError(f"{tokens / name}: holds id {largest}; must be < {meta.vocab_size}; {REMEDY}")
            num_bytes, num_shards = num_bytes + size, num_shards + 1
    return (
        f"checked  {num_shards} token shards, {num_bytes:,} bytes, by SHA-256 and largest id "
        f"in {time.perf_counter() - start:.2f} s"
    )


def digest_and_largest(path: Path, dtype: np.dtype) -> tuple[str, int, int]:
    """Return SHA-256, largest id (-1 for none) and size of a shard, read in pieces."""
    digest, largest, size = hashlib.sha256(), -1, HEADER.size
    with open_regular(path) as file:
        header = file.read(HEADER.size)
        digest.update(header)
        if len(header) == HEADER.size and HEADER.unpack(header)[2] != dtype.itemsize:
            raise UserError(f"{path}: has another width than meta.json's dtype; {REMEDY}")
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            ids = np.frombuffer(chunk, dtype, len(chunk) // dtype.itemsize)
            largest, size = max(largest, int(ids.max(initial=0))), size + len(chunk)
    return digest.hexdigest(), largest, size

"""Token shards: long sequences of token ids in memory-mapped files.

A split is a run of files `train_00000.bin, train_00001.bin, …`, which together hold one sequence of tokens. A file is a
header of 24 bytes (magic, format version, bytes per token, number of tokens; little-endian) and then the tokens as
little-endian uint16, or uint32 where the vocabulary needs it. Reading maps the files into memory, so the operating
system loads only the pages that are looked at, and a stream may be larger than the memory.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsv3.artifacts import open_regular, replacing
from dsv3.errors import UserError

MAGIC = b"DSV3TOKS"
VERSION = 1
HEADER = struct.Struct("<8sIIQ")  # magic, version, bytes per token, number of tokens
DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}

Tokens = npt.NDArray[np.unsignedinteger]


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the narrowest dtype of a shard that holds every id below `vocab_size`."""
    return DTYPES[2] if vocab_size <= 1 << 16 else DTYPES[4]


def shard_path(directory: Path, split: str, index: int) -> Path:
    """Return the path of shard number `index` of a split."""
    return directory / f"{split}_{index:05d}.bin"


def write_shards(
    directory: Path, split: str, chunks: Iterable[Tokens], dtype: np.dtype, shard_tokens: int
) -> list[Path]:
    """Write the tokens of `chunks`, in order, to shards of at most `shard_tokens` tokens; return their paths.

    At least one shard is written, even for no tokens. Only one chunk is held in memory at a time. Each file is written
    under a temporary name and renamed when it is complete.
    """
    paths: list[Path] = []
    pieces = _pieces(chunks, shard_tokens)
    piece = next(pieces, np.empty(0, dtype))
    while piece is not None:
        path = shard_path(directory, split, len(paths))
        with replacing(path) as temporary, temporary.open("wb") as file:
            count = 0
            file.write(HEADER.pack(MAGIC, VERSION, dtype.itemsize, count))
            while piece is not None and count + len(piece) <= shard_tokens:
                file.write(piece.astype(dtype, casting="same_kind").tobytes())
                count += len(piece)
                piece = next(pieces, None)
            file.seek(0)
            file.write(HEADER.pack(MAGIC, VERSION, dtype.itemsize, count))
        paths.append(path)
    return paths


def _pieces(chunks: Iterable[Tokens], shard_tokens: int) -> Iterator[Tokens]:
    """Yield the chunks, cut where a shard is full."""
    free = shard_tokens
    for chunk in chunks:
        start = 0
        while start < len(chunk):
            piece = chunk[start : start + free]
            yield piece
            start += len(piece)
            free = free - len(piece) or shard_tokens


class TokenStream:
    """The tokens of one split as one sequence, memory-mapped: `len(stream)` and `stream[start:stop]`.

    Opening raises `UserError` where a shard is missing, cut short or of another format. Pickles as its paths, so worker
    processes map the files again instead of receiving a copy of their contents.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(paths)
        self._shards = [_map_shard(path) for path in self.paths]
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, span: slice) -> Tokens:
        """Return tokens `start` to `stop` (clipped as a list clips them); a view where one shard holds them all."""
        start, stop, step = span.indices(len(self))
        assert step == 1, "a token stream is read in order"
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts: list[Tokens] = []
        for shard, shard_start in zip(self._shards[first:], self._starts[first:], strict=False):
            if shard_start >= stop:
                break
            parts.append(shard[max(0, start - shard_start) : stop - shard_start])
        if not parts:
            return np.empty(0, self._shards[0].dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __reduce__(self) -> tuple[type["TokenStream"], tuple[list[Path]]]:
        return type(self), (self.paths,)


def _map_shard(path: Path) -> Tokens:
    """Return the tokens of one file, memory-mapped and read-only; `UserError` for a file that is not a whole shard."""
    try:
        with open_regular(path) as file:
            header, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); run the tokenize stage") from None
    count, dtype = _parse_header(header, path)
    expected = HEADER.size + count * dtype.itemsize
    if size != expected:
        raise UserError(f"{path}: has {size} bytes where its header promises {expected}; run the tokenize stage again")
    return np.memmap(path, dtype, "r", HEADER.size, (count,)) if count else np.empty(0, dtype)


def _parse_header(header: bytes, path: Path) -> tuple[int, np.dtype]:
    """Return the number of tokens and their dtype from a shard's header."""
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise UserError(f"{path}: is no token shard; run the tokenize stage again")
    _, version, itemsize, count = HEADER.unpack(header)
    if version != VERSION or itemsize not in DTYPES:
        raise UserError(
            f"{path}: has format {version} with {itemsize} bytes per token; "
            f"must be format {VERSION} with 2 or 4; run the tokenize stage again"
        )
    return count, DTYPES[itemsize]

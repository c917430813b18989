"""Text of any length to tokens, in pieces of bounded size and on all cores.

A long document is cut into pieces that are encoded one by one, at borders of words (`dsv3.data.words`), where a cut
changes nothing for a byte-level BPE. With a tokenizer of another kind, tokens near a cut may be others than without it.

A byte-level BPE gives each segment between two borders the same tokens wherever it stands, so each different one is
encoded once and then looked up. Other tokenizers encode whole pieces. What is encoded is decoded again and compared
with its text, so it is known and not assumed whether the tokens decode to the text exactly.

A task is a group of pieces. Small corpora are encoded in this process; large ones by several processes, with a bounded
number of groups in flight.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dsv3.data.corpus import Chunk
from dsv3.data.tokenizer import SpecialTokens, read_tokenizer, special_tokens, splits_at_word_borders
from dsv3.data.words import MAX_CHARACTERS, WORD_BORDER, segments

PIECE_CHARACTERS = 1 << 16
GROUP_CHARACTERS = 1 << 20


class Piece(NamedTuple):
    """A part of a document that is encoded at once."""

    text: str
    opens: bool
    """Whether a document begins here."""
    closes: bool
    """Whether a document ends here."""


class Encoded(NamedTuple):
    """The tokens of a group of pieces, and the size of the text that they encode."""

    tokens: npt.NDArray[np.unsignedinteger]
    characters: int
    bytes: int
    documents: int
    round_trip_exact: bool


def pieces(chunks: Iterable[Chunk]) -> Iterator[Piece]:
    """Yield the documents in pieces of about PIECE_CHARACTERS, cut at a word's border where there is one."""
    text, document, opens = "", -1, True
    for chunk in chunks:
        if chunk.document != document and text:
            yield Piece(text, opens, closes=True)
        if chunk.document != document:
            text, document, opens = "", chunk.document, True
        text += chunk.text
        start = 0
        while len(text) - start > 2 * PIECE_CHARACTERS:  # so what is left is never empty
            end = _cut(text, start + PIECE_CHARACTERS)
            yield Piece(text[start:end], opens, closes=False)
            start, opens = end, False
        text = text[start:]
    if text:
        yield Piece(text, opens, closes=True)


def _cut(text: str, position: int) -> int:
    """Return the first border of a word at or after `position`, or `position` itself if none is near."""
    match = WORD_BORDER.search(text, position, position + PIECE_CHARACTERS // 2)
    return match.start() if match else position


def groups(all_pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield the pieces in lists of about GROUP_CHARACTERS together."""
    group, characters = [], 0
    for piece in all_pieces:
        group.append(piece)
        characters += len(piece.text)
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


class Encoder:
    """Encodes groups of pieces with the tokenizer in a folder."""

    def __init__(self, directory: Path, dtype: np.dtype) -> None:
        self.tokenizer: Tokenizer = read_tokenizer(directory)
        self.special: SpecialTokens = special_tokens(self.tokenizer, directory)
        self.dtype = dtype
        self._known: dict[str, bytes] | None = {} if splits_at_word_borders(self.tokenizer) else None
        """The tokens of the segments met so far; None where segments depend on each other."""
        self._num_known_characters = 0

    def encode(self, group: list[Piece]) -> Encoded:
        """Return the tokens of `group`: bos before each document, and eos behind it where that is another token."""
        texts = [piece.text for piece in group]
        ids, is_exact = self._whole(texts) if self._known is None else self._by_segment(texts, self._known)
        bos, eos = (self._as_bytes([token]) for token in (self.special.bos_token_id, self.special.eos_token_id))
        ends = eos if eos != bos else b""
        parts = [
            part
            for piece, piece_ids in zip(group, ids, strict=True)
            for part in (bos if piece.opens else b"", piece_ids, ends if piece.closes else b"")
        ]
        return Encoded(
            np.frombuffer(b"".join(parts), self.dtype),
            characters=sum(map(len, texts)),
            bytes=sum(len(text.encode()) for text in texts),
            documents=sum(piece.opens for piece in group),
            round_trip_exact=is_exact,
        )

    def _by_segment(self, texts: list[str], known: dict[str, bytes]) -> tuple[list[bytes], bool]:
        """Return what `_whole` returns, by encoding only segments that were not met before."""
        if self._num_known_characters > MAX_CHARACTERS:
            known.clear()
            self._num_known_characters = 0
        cut = [segments(text) for text in texts]
        new = list(set(chain.from_iterable(cut)).difference(known))
        encoded, is_exact = self._whole(new)
        known.update(zip(new, encoded, strict=True))
        self._num_known_characters += sum(map(len, new))
        return [b"".join(map(known.__getitem__, parts)) for parts in cut], is_exact

    def _whole(self, texts: list[str]) -> tuple[list[bytes], bool]:
        """Return the ids of each text as bytes, and whether they decode to the texts exactly."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        decoded = self.tokenizer.decode_batch(ids, skip_special_tokens=False)
        return [self._as_bytes(text_ids) for text_ids in ids], decoded == texts

    def _as_bytes(self, ids: list[int]) -> bytes:
        return np.array(ids, self.dtype).tobytes()


def encode_groups(
    all_groups: Iterable[list[Piece]], directory: Path, dtype: np.dtype, num_processes: int
) -> Iterator[Encoded]:
    """Encode the groups and yield them in order; the result does not depend on `num_processes`."""
    if num_processes == 1:
        yield from map(Encoder(directory, dtype).encode, all_groups)
        return
    # Started afresh rather than forked: the tokenizers library runs threads, which a fork would not copy.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _start_worker, (directory, dtype)) as pool:
        pending: deque[Future[Encoded]] = deque()
        for group in all_groups:
            pending.append(pool.submit(_encode_in_worker, group))
            if len(pending) >= 2 * num_processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


_worker: list[Encoder] = []
"""The encoder of a worker process."""


def _start_worker(directory: Path, dtype: np.dtype) -> None:
    """Load the tokenizer once in a worker, which keeps to one thread: the processes are as many as the cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.append(Encoder(directory, dtype))


def _end_with_parent() -> None:
    """End this worker when the process that started it has: a killed one has nobody told, and a pool waits for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    parent.join()
    os._exit(1)


def _encode_in_worker(group: list[Piece]) -> Encoded:
    return _worker[0].encode(group)

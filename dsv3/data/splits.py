"""Training, validation and test: which part of a corpus belongs to which.

By characters, the text is cut twice, as the Hub's tiny Shakespeare is: the first 90 % train, the rest is halved
(1,003,854 / 55,770 / 55,770 characters). The order is kept, so validation and test together are the last tenth of the
text, which is nanoGPT's validation set. A document across a cut is divided.

By documents, each document is assigned to a split by a hash of its text. So equal documents are in the same split, none
is both trained and tested on, and adding documents moves no other; the fractions are met only on average.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator

from dsv3.data.corpus import Chunk, Measure
from dsv3.errors import UserError
from dsv3.params.tokenize import TokenizeParams

SPLITS = ("train", "validation", "test")

Selector = Callable[[Iterable[Chunk]], Iterator[Chunk]]
"""Takes the chunks of a corpus, returns those of one split."""


def split_selectors(measure: Measure, params: TokenizeParams) -> dict[str, Selector]:
    """Return a selector for each split; raise `UserError` where one would be empty or documents are too few."""
    if params.split_by == "documents":
        if measure.num_documents < len(SPLITS):
            raise UserError(
                f"tokenize.split_by is documents; must be characters: there are {measure.num_documents} document(s)"
            )
        return {split: _document_selector(split, params) for split in SPLITS}
    spans = character_spans(measure.characters, params.validation_fraction, params.test_fraction)
    for split, span in spans.items():
        if not span:
            raise UserError(f"the corpus has {measure.characters} characters; too few for its {split} split")
    return {split: _character_selector(span) for split, span in spans.items()}


def character_spans(characters: int, validation_fraction: float, test_fraction: float) -> dict[str, range]:
    """Return the characters of each split, rounded as the Hub's script rounds them."""
    held_out = validation_fraction + test_fraction
    first = int(characters * (1 - held_out))
    second = first + int((characters - first) * (validation_fraction / held_out))
    return {"train": range(first), "validation": range(first, second), "test": range(second, characters)}


def _character_selector(span: range) -> Selector:
    """Return the selector of the characters in `span`."""

    def select(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        position = 0
        for chunk in chunks:
            start, stop = max(0, span.start - position), span.stop - position
            position += len(chunk.text)
            if stop > 0 and start < len(chunk.text):
                yield Chunk(chunk.document, chunk.text[start:stop])

    return select


def _document_selector(split: str, params: TokenizeParams) -> Selector:
    """Return the selector of the documents whose hash assigns them to `split`."""

    def select(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        return (chunk for chunk in chunks if split_of(chunk.text, params) == split)

    return select


def split_of(document: str, params: TokenizeParams) -> str:
    """Return the split to which a document belongs; a pure function of its text."""
    draw = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") / 2**64
    if draw < params.validation_fraction:
        return "validation"
    return "test" if draw < params.validation_fraction + params.test_fraction else "train"

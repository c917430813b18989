"""Text in segments whose tokens don't depend on each other, so that each different one is looked at once.

A byte-level BPE splits a text into words, and no token crosses a word's border. The place that is a border for sure is
before a space or line end with no white space behind it (the splitting rule sets the last white space before a word
apart). A segment reaches from one such place to the next: mostly a word with its punctuation. A text has few different
segments, so counting words and looking tokens up by segment costs a fraction of splitting and merging all of it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers.pre_tokenizers import ByteLevel

WORD_BORDER = re.compile(r"(?=[ \n]\S)")
MAX_CHARACTERS = 1 << 22
"""Characters of the different segments that are remembered; then they are forgotten, so that memory does not grow with
the text. Text without spaces has few segments, each as long as a piece of it, so segments are not what is counted."""
MAX_WORD_CHARACTERS = 128
"""The trainer's time grows with the square of a word's length, and text without spaces is one word."""
LONG_WORD = re.compile(rf"\S{{{MAX_WORD_CHARACTERS + 1},}}")
REPEATED_CHARACTERS = 1 << 16


def segments(text: str) -> list[str]:
    """Return `text` cut at every border of `WORD_BORDER`."""
    return WORD_BORDER.split(text)


def word_counts(texts: Iterable[str], pre_tokenizer: ByteLevel) -> Counter[str]:
    """Return how often each word of `pre_tokenizer` occurs, long ones cut."""
    words: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    num_characters = 0
    for text in texts:
        cut = segments(text)
        num_characters += sum(map(len, set(cut).difference(counts)))
        counts.update(cut)
        if num_characters > MAX_CHARACTERS:
            _add_words(words, counts, pre_tokenizer)
            counts.clear()
            num_characters = 0
    _add_words(words, counts, pre_tokenizer)
    return words


def _add_words(words: Counter[str], counts: Counter[str], pre_tokenizer: ByteLevel) -> None:
    """Add the words of segments that occur so often."""
    for segment, count in counts.items():
        for part in short_words(segment):
            for word, _ in pre_tokenizer.pre_tokenize_str(part):
                words[word] += count


def short_words(text: str) -> Iterator[str]:
    """Yield `text` in parts, cut only inside words that are longer than MAX_WORD_CHARACTERS."""
    begin = 0
    for word in LONG_WORD.finditer(text):
        for cut in range(word.start() + MAX_WORD_CHARACTERS, word.end(), MAX_WORD_CHARACTERS):
            yield text[begin:cut]
            begin = cut
    yield text[begin:]


def repeated(words: Counter[str]) -> Iterator[str]:
    """Yield texts that hold each word as often as it occurs, separated by spaces; words of one letter have no pairs.

    The library's trainer takes texts, not counts. To split at spaces costs it a third of what its own rule costs.
    """
    for word, count in words.items():
        if len(word) == 1:
            continue
        most = max(1, REPEATED_CHARACTERS // len(word))
        for done in range(0, count, most):
            yield f"{word} " * min(most, count - done)

"""What `evaluate` says of a text: a few sums, and the scores that are computed from them.

A row of `SCORES` is all that a score needs: its name, unit and meaning for tables and trackers, and its formula.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class SplitScore:
    """Sums over one split, which add up over splits."""

    nats: float
    tokens: int
    characters: int
    bytes: int

    def __add__(self, other: "SplitScore") -> "SplitScore":
        return SplitScore(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.characters + other.characters,
            self.bytes + other.bytes,
        )

    def metrics(self) -> dict[str, float | int]:
        """Return the scores and the counts, under the names of the metrics table."""
        counts = {name: count for name, count in asdict(self).items() if name != "nats"}
        return {name: score.formula(self) for name, score in SCORES.items()} | counts


def perplexity(nats_per_token: float) -> float:
    """Return the exponential, cut off at e^700, for a number of more than e^709 does not fit 64 bits."""
    return math.exp(min(nats_per_token, 700.0))


@dataclass(frozen=True)
class Score:
    """How good a model's prediction of a text is, as one number."""

    unit: str
    description: str
    formula: Callable[[SplitScore], float]


SCORES = MappingProxyType(
    {
        "nats_per_token": Score("nats/token", "cross-entropy over a whole split", lambda sums: sums.nats / sums.tokens),
        "perplexity": Score("", "exp(nats_per_token)", lambda sums: perplexity(sums.nats / sums.tokens)),
        "nats_per_char": Score(
            "nats/char",
            "cross-entropy per character: comparable across tokenizers",
            lambda sums: sums.nats / sums.characters,
        ),
        "bits_per_byte": Score(
            "bits/byte",
            "cross-entropy per byte of UTF-8: comparable across tokenizers and scripts",
            lambda sums: sums.nats / math.log(2) / sums.bytes,
        ),
    }
)
"""By name, in the order in which they are written."""

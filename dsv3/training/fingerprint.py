"""What makes two trainings the same training: a fingerprint of everything that shapes the weights.

Checkpoints lie in a folder that it names, with the facts that it was made of beside them:

    .checkpoints/<fingerprint>/facts.json

They say too whether the training has ended, and so how long they stay (`dsv3.training.leftovers`). A training that
finds none of its own says in one line which others of its experiment lie there, and what differs.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from dsv3.artifacts import read_model, write_json
from dsv3.errors import UserError
from dsv3.training.checkpoint import checkpoints

FACTS = "facts.json"
Ended = Literal["no", "finished", "kept"]
"""Whether a training has ended; kept: its last checkpoint was asked for (runtime.keep_last_checkpoint)."""
MOST_NAMED = 3
"""Checkpoints, and differences of each, that the one line names."""


class Facts(BaseModel):
    """The content of facts.json."""

    model_config = ConfigDict(extra="ignore", strict=True)

    ended: Ended = "no"
    experiment: str = ""
    facts: dict[str, Any] = {}


@dataclass(frozen=True)
class Fingerprint:
    """The facts that the weights depend on, JSON values by name; their order is no matter."""

    facts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Return the name under which checkpoints lie."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Return what differs in the facts of another training, a few words each: parameters, then data, then code."""
        here, there = dict(flattened(self.facts)), dict(flattened(other))
        names = sorted(here.keys() | there.keys(), key=lambda place: (place[0] == "code", place[0] == "tokens", place))
        return [
            difference(name, there.get(name), here.get(name)) for name in names if here.get(name) != there.get(name)
        ]


def flattened(facts: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the values of nested mappings with the names that lead to them."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from flattened(value, (*place, name))
        else:
            yield (*place, name), value


def difference(place: tuple[str, ...], there: Any, here: Any) -> str:
    """Return one difference as the user knows it: a parameter with both values, a file of code, data, weights."""
    if place[0] == "code":
        return f"{place[-1]} is other code"
    if place[0] == "tokens":
        return "the token data is other data"
    if place[0] == "initial_weights":
        return "the weights of train.init_from are others"
    if place[0] == "teachers":
        return "the weights of train.teachers are others"
    return f"{'.'.join(place)} is {json.dumps(there)} there and {json.dumps(here)} here"


def write_facts(directory: Path, fingerprint: Fingerprint, experiment: str, ended: Ended = "no") -> None:
    """Write what the fingerprint of `directory` was made of, its experiment, and whether it has ended."""
    write_json(directory / FACTS, {"experiment": experiment, "ended": ended, "facts": fingerprint.facts})


def other_checkpoints(directory: Path, fingerprint: Fingerprint, experiment: str) -> str:
    """Return one line on the checkpoints of the same experiment beside `directory`: which, and what differs.

    The newest come first. Empty where there are none. A finished training's is not for others, unless it was asked for.
    """
    found: list[tuple[float, str]] = []
    for file in directory.parent.glob(f"*/{FACTS}"):
        try:
            known, saved = read_model(file, Facts, ""), checkpoints(file.parent)
            is_left = saved and file.parent != directory and known.ended != "finished"
            if is_left and known.experiment == experiment:
                reasons = shortened(fingerprint.differences(known.facts), ", ")
                folder = saved[-1].relative_to(directory.parent.parent)
                found.append((saved[-1].stat().st_mtime, f"{folder} ({reasons})"))
        except (OSError, UserError, RecursionError):  # its training ends just now, or something else wrote there
            continue
    if not found:
        return ""
    lines = [line for _, line in sorted(found, reverse=True)]
    return (
        f"not resumed, of another training: {shortened(lines, '; ')}; train.resume_from_checkpoint would start from one"
    )


def shortened(items: list[str], separator: str) -> str:
    """Return the first of `items` in one line, and how many more there are."""
    more = len(items) - MOST_NAMED
    return separator.join(items[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")

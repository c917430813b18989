"""What dvc.yaml says of the stages: the list of them that tests go through."""

import shlex
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

PIPELINE: dict[str, Any] = YAML(typ="safe").load(Path(__file__).parents[1] / "dvc.yaml")
STAGES: dict[str, dict[str, Any]] = PIPELINE["stages"]


def paths_of(entries: list[Any] | None) -> set[str]:
    """The paths in a list of dependencies or outputs, each of which may have flags."""
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries or []}


def deps_of(stage: dict[str, Any]) -> set[str]:
    """What a stage reads, its code among it."""
    return paths_of(stage.get("deps"))


def outputs_of(stage: dict[str, Any]) -> set[str]:
    """What a stage writes."""
    return set().union(*(paths_of(stage.get(kind)) for kind in ("outs", "metrics", "plots")))


def arguments_of(stage: dict[str, Any]) -> list[str]:
    """The options in a stage's command, and their values."""
    return shlex.split(stage["cmd"])[3:]

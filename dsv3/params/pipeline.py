"""What the stages of a dvc.yaml write, for those who look at their results. The file itself is DVC's to judge."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dsv3.artifacts import invalid
from dsv3.params.read import read_yaml

Entry = str | dict[str, Any]
"""A path, or a path with its flags."""


class Stage(BaseModel):
    """The outputs of a stage."""

    outs: list[Entry] = []
    metrics: list[Entry] = []
    plots: list[Entry] = []


class Pipeline(BaseModel):
    """The part of a dvc.yaml that is read here."""

    stages: dict[str, Stage]


def read_outputs(pipeline: Path, kinds: Iterable[str] = ("outs", "metrics", "plots")) -> dict[str, list[Path]]:
    """Return the paths that each stage of a dvc.yaml writes, in its order; raise `UserError` for another file."""
    try:
        stages = Pipeline.model_validate(read_yaml(pipeline)).stages
    except ValidationError as error:
        raise invalid(pipeline, error, "git checkout brings the file back") from None
    return {name: [_path(entry) for kind in kinds for entry in getattr(stage, kind)] for name, stage in stages.items()}


def _path(entry: Entry) -> Path:
    return Path(entry if isinstance(entry, str) else next(iter(entry), ""))

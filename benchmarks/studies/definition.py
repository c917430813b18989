"""What a study is: variants of one training, each with several seeds; a YAML file per study stands beside this one.

A variant is an overlay: `section.key` for params.yaml, `file.json:key` for an architecture, the seeds apart. A run is a
DVC experiment named `<study>-<variant>-<seed>`, filed in Aim under the study's name.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dsv3.errors import UserError
from dsv3.params.read import read_yaml
from dsv3.presets import flags

FOLDER = Path(__file__).parent


class _Closed(BaseModel):
    """A frozen set of fields without others."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Variant(_Closed):
    """One way to train."""

    part: str
    """The part of the recipe that it asks about, capitalized."""
    change: str
    """What is different, a clause."""
    set: dict[str, Any] = Field(default_factory=dict)
    """The overlay."""


class Study(_Closed):
    """A question, as runs."""

    document: str
    """The page whose marked section the report fills."""
    figure: Literal["dots", "curves", "law"]
    """dots: final scores of many variants; curves: the course of a few; law: a grid of sizes and lengths, fitted."""
    baseline: str
    """The variant that the others are compared with."""
    goal_percent: float | None = None
    """Largest relative difference of the validation loss that is aimed at."""
    seeds: list[int]
    common: dict[str, Any] = Field(default_factory=dict)
    """Overlay of every variant."""
    variants: dict[str, Variant]


def study_names() -> list[str]:
    """Return the names of all studies."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_study(name: str) -> Study:
    """Return the study; raise `UserError` where there is none of that name."""
    if name not in study_names():
        raise UserError(f"{name} is no study; known: {', '.join(study_names())}")
    return Study.model_validate(read_yaml(FOLDER / f"{name}.yaml"))


def run_names(name: str, study: Study) -> dict[str, tuple[str, int]]:
    """Return (variant, seed) by the name of the run, all variants of a seed before the next seed."""
    return {f"{name}-{variant}-{seed}": (variant, seed) for seed in study.seeds for variant in study.variants}


def run_flags(name: str, study: Study, variant: str, seed: int) -> list[str]:
    """Return the arguments of `dvc exp run` that make one run."""
    return flags({"seed": seed, "runtime.experiment": name, **study.common, **study.variants[variant].set})

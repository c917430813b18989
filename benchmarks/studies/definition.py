"""What a study is: variants of one training, each with several seeds; a YAML file per study stands beside this one.

A variant is an overlay: `section.key` for params.yaml, `file.json:key` for an architecture, the seeds apart. A run is a
DVC experiment named `<study>-<variant>-<seed>`, filed in Aim under the study's name. A variant may learn from the
models of others, and is then trained after them.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
    teachers: list[str] = Field(default_factory=list)
    """Variants, defined before this one, whose model of the same seed is one of its `train.teachers`."""
    seed_offset: int = 0
    """Added to the seed that a run is named by, so that the teachers of one seed differ."""


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

    @model_validator(mode="after")
    def teachers_come_first(self) -> Self:
        """Refuse a teacher that is no variant, or that would be trained later."""
        known: list[str] = []
        for name, variant in self.variants.items():
            for teacher in variant.teachers:
                if teacher not in known:
                    raise ValueError(f"{name} names the teacher {teacher}; must be one of those before it: {known}")
            known.append(name)
        return self


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
    """Return the arguments of `dvc exp run` that make one run, but for its teachers."""
    own = study.variants[variant]
    return flags({"seed": seed + own.seed_offset, "runtime.experiment": name, **study.common, **own.set})


def teacher_runs(name: str, study: Study, variant: str, seed: int) -> list[str]:
    """Return the names of the runs whose models teach one run."""
    return [f"{name}-{teacher}-{seed}" for teacher in study.variants[variant].teachers]

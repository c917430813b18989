"""What makes a run identifiable: its name, its parameters, the code, the data and the machine.

Under `dvc exp run` the experiment's name is known before the run starts and stands in the environment (as do the
baseline commit, the stage, and the root of the repository, which in `--temp` and `--queue` runs is the parent's: the
one anchor for shared files).
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from dsv3.errors import one_line
from dsv3.tracking.revision import changed_params, git, has_changed_code, shaping

RECORDED_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "dvc", "aim")
SHOWN_CHANGES = 2
"""Most changes in a run's title; its description has all."""

KEY_DIGITS = 8
"""Digits of the key that tell runs of one name apart."""

HASH_DIGITS = 24
"""Hexadecimal digits of a run's hash, as in Aim."""


@dataclass(frozen=True)
class RunIdentity:
    """Everything that a tracker shows beside the curves; native types only, so that any of them can store it."""

    name: str
    """DVC's experiment name, or `workspace-<commit>`."""

    experiment: str
    """Group under which runs are filed."""

    tags: tuple[str, ...]
    params: dict[str, Any]
    """The whole params.yaml, validated."""

    architecture: dict[str, Any]
    """The model's configuration, the file that `model.config` names."""

    dvc: dict[str, Any]
    """Experiment, baseline, stage, commit, data and fingerprint."""

    env: dict[str, Any]
    """Versions, device, number of processes, what precision and which backends ran."""

    size: dict[str, Any]
    """Estimates of parameters, memory and arithmetic (`dsv3.sizing`)."""

    key: str
    """What tells the run from others of its name: the training's fingerprint, or a digest made from it."""

    changes: dict[str, Any] = field(default_factory=dict)
    """Parameters that differ from the baseline commit's, with their values here."""

    plan_summary: str = ""
    """The training's plan in a few lines, which the terminal showed before it began."""

    @property
    def unique_name(self) -> str:
        """The name, and the first digits of the key: for trackers that find a run by its name."""
        return f"{self.name}-{self.key[:KEY_DIGITS]}"

    @property
    def own_hash(self) -> str:
        """The hash of a run to which Aim has given none."""
        return self.key[:HASH_DIGITS]

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """What every tracker, and run.json, keep of the run in whole sections."""
        names = ("dvc", "env", "size", "params", "architecture")
        return {name: getattr(self, name) for name in names}

    @property
    def title(self) -> str:
        """The name, and the first changes."""
        shown = self.change_tags[:SHOWN_CHANGES] + (["…"] if len(self.changes) > SHOWN_CHANGES else [])
        return " · ".join([self.name, *shown])

    @property
    def change_tags(self) -> list[str]:
        """The changes as `train.use_fp8: true`, each cut to a line of 60 characters."""
        return [f"{name}: {_plain(value)}"[:60] for name, value in self.changes.items()]


def run_identity(
    params: BaseModel,
    fingerprint: str,
    architecture: Mapping[str, Any],
    data: Mapping[str, Any],
    size: Mapping[str, Any],
    env: Mapping[str, Any],
) -> RunIdentity:
    """Return the identity of the training that is about to start in this process.

    `params` are the validated parameters, `architecture` the content of the file that they name, `data` the token
    data's meta.json, `size` the estimates of its size, `env` what only the training knows (device, world_size,
    precision, experts ...); versions and platform are added here.
    """
    values = native(params.model_dump())
    corpus = data.get("corpus", {})
    commit = git("rev-parse", "HEAD")
    return RunIdentity(
        name=run_name(os.environ.get("DVC_EXP_NAME")),
        experiment=experiment_name(params),
        tags=_tags(values, corpus.get("source"), env.get("precision")),
        params=values,
        architecture=native(architecture),
        dvc={
            **experiment_facts(os.environ.get("DVC_EXP_NAME")),
            "git_sha": commit,
            "git_dirty": None if commit is None else has_changed_code(),
            "data_source": corpus.get("source"),
            "data_sha256": data.get("sha256"),
            "corpus_sha256": corpus.get("sha256"),
            "fingerprint": fingerprint,
        },
        env=native({**software(), **env}),
        size=native(dict(size)),
        key=fingerprint,
        changes=changed_params(values, architecture),
    )


def experiment_name(params: BaseModel) -> str:
    """Return the group under which runs of the validated parameters are filed."""
    return group_name(params.model_dump(include={"runtime", "model"}))


def group_name(values: Mapping[str, Any]) -> str:
    """Return the group under which runs of the content of params.yaml are filed."""
    return one_line(values["runtime"]["experiment"] or Path(values["model"]["config"]).stem)


def later_identity(
    training: RunIdentity, params: BaseModel, experiment: str | None, made_with: Mapping[str, Any] | None = None
) -> RunIdentity:
    """Return the identity of the run that a later stage, or `rebuild`, adds to: often that of the training itself.

    A stage of another experiment than the training's, or with other parameters, has a run of its own: it scores or
    samples the same weights, and must not overwrite what was recorded of them. `made_with` has the sections of
    params.yaml that hold instead of those in `params`.
    """
    values = native(params.model_dump())
    values |= {name: value for name, value in native(made_with or {}).items() if values.get(name, value) != value}
    is_same_experiment = experiment in (None, training.dvc.get("exp_name"))
    if is_same_experiment and shaping(values) == shaping(training.params):
        return training
    name = run_name(experiment)
    text = json.dumps([training.key, name, shaping(values)], sort_keys=True)
    return replace(
        training,
        name=name,
        experiment=group_name(values),
        params=values,
        dvc={**training.dvc, **experiment_facts(experiment), "training": training.name},
        key=hashlib.sha256(text.encode()).hexdigest(),
        changes=changed_params(values, training.architecture),
    )


def run_name(experiment: str | None) -> str:
    """Return the name of a run: the experiment's, or that of the workspace's commit."""
    if experiment:
        return experiment
    commit = git("rev-parse", "HEAD")
    return f"workspace-{commit[:7] if commit else 'untracked'}"


def experiment_facts(experiment: str | None) -> dict[str, str | None]:
    """Return which experiment and stage of DVC this process is, and on which commit."""
    return {
        "exp_name": experiment,
        "baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV"),
        "stage": os.environ.get("DVC_STAGE"),
    }


def _plain(value: Any) -> str:
    """Return a value as params.yaml writes it, on one line."""
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _tags(values: Mapping[str, Any], source: str | None, precision: str | None) -> tuple[str, ...]:
    """Return what many runs share: configuration, source, optimizer, precision."""
    tags = (Path(values["model"]["config"]).stem, source, values["train"]["optim"], precision)
    return tuple(dict.fromkeys(one_line(tag) for tag in tags if tag))


def software() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that can change a number, and the platform."""
    return {"python": platform.python_version(), "platform": platform.platform()} | {
        package: _version(package) for package in RECORDED_PACKAGES
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def project_root() -> Path:
    """Return the folder that shared files (.aim, .checkpoints) lie in.

    `$DVC_ROOT` where DVC runs us; else the nearest folder above the working directory that holds .dvc; else the
    working directory.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


def aim_folder(aim_repo: str | None) -> Path | None:
    """Return the folder `.aim` that `runtime.aim_repo` means; None for a server."""
    if aim_repo and "://" in aim_repo:
        return None
    folder = Path(aim_repo).expanduser() if aim_repo else project_root()
    return folder if folder.name == ".aim" else folder / ".aim"


def native(value: Any) -> Any:
    """Return `value` with its containers copied and every leaf as None, bool, int, float or str.

    Trackers refuse numpy scalars, paths, dates, sets, and integers beyond 64 bits (which become text here).
    """
    if isinstance(value, Mapping):
        return {str(key): native(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [native(item) for item in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, Integral):
        return int(value) if int(value).bit_length() < 64 else str(value)
    return float(value) if isinstance(value, Real) else str(value)

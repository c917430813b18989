"""What makes a run identifiable: its name, its parameters, the code, the data and the machine.

Under `dvc exp run` the experiment's name is known before the run starts and stands in the environment (as do the
baseline commit, the stage, and the root of the repository, which in `--temp` and `--queue` runs is the parent's: the
one anchor for shared files).
"""

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

RECORDED_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "dvc", "aim")
NO_CODE = ("results", "dvc.lock", "params.yaml", "mini_model/config*.json")
"""What may differ from the commit without leaving a run in doubt: results, and what the run records whole (`dvc exp
run -S` changes these files). In Git's patterns."""


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
    source = os.environ
    corpus = data.get("corpus", {})
    config = Path(values["model"]["config"]).stem
    code = ["--untracked-files=no", "--", ".", *(f":(exclude){name}" for name in NO_CODE)]
    commit = git("rev-parse", "HEAD")
    told = (corpus.get("source"), values["train"]["optim"], env.get("precision"))
    return RunIdentity(
        name=source.get("DVC_EXP_NAME") or f"workspace-{commit[:7] if commit else 'untracked'}",
        experiment=experiment_name(params),
        tags=tuple(dict.fromkeys(tag for tag in (config, *told) if tag)),
        params=values,
        architecture=native(architecture),
        dvc={
            "exp_name": source.get("DVC_EXP_NAME"),
            "baseline_rev": source.get("DVC_EXP_BASELINE_REV"),
            "stage": source.get("DVC_STAGE"),
            "git_sha": commit,
            "git_dirty": None if commit is None else bool(git("status", "--porcelain", *code)),
            "data_source": corpus.get("source"),
            "data_sha256": data.get("sha256"),
            "corpus_sha256": corpus.get("sha256"),
            "fingerprint": fingerprint,
        },
        env=native({**software(), **env}),
        size=native(dict(size)),
    )


def experiment_name(params: Any) -> str:
    """Return the group under which runs of the validated parameters are filed."""
    return params.runtime.experiment or Path(params.model.config).stem


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


def git(*arguments: str) -> str | None:
    """Return what `git` prints for `arguments`, stripped; None outside a repository or without git."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def project_root() -> Path:
    """Return the folder that shared files (.aim, .checkpoints) lie in.

    `$DVC_ROOT` where DVC runs us; else the nearest folder above the working directory that holds .dvc; else the
    working directory.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


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

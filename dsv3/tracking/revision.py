"""What Git and DVC know of what runs here: the experiment, and what changed since its baseline commit.

The baseline is the commit that DVC names in the environment; without DVC it is HEAD.
"""

import os
import subprocess
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

NO_CODE = ("results", "dvc.lock", "params.yaml", "mini_model/config*.json")
"""What may differ from the commit without leaving a run in doubt: results, and what the run records whole (`dvc exp
run -S` changes these files). In Git's patterns."""


def git(*arguments: str) -> str | None:
    """Return what `git` prints for `arguments`, stripped; None outside a repository or without git."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def has_changed_code() -> bool:
    """Return whether the workspace's code differs from HEAD's."""
    code = ["--untracked-files=no", "--", ".", *(f":(exclude){name}" for name in NO_CODE)]
    return bool(git("status", "--porcelain", *code))


def applied_experiment() -> str | None:
    """Return the name of the newest DVC experiment whose dvc.lock lies in the workspace; None for the commit's own."""
    lock = git("hash-object", "dvc.lock")
    if lock is None or lock == git("rev-parse", "HEAD:./dvc.lock"):
        return None
    refs = git("for-each-ref", "--sort=-committerdate", "--format=%(refname)", "refs/exps") or ""
    names = [ref for ref in refs.splitlines() if ref.split("/")[2] not in ("exec", "celery", "temp")]
    return next((ref.rsplit("/", 1)[1] for ref in names if git("rev-parse", f"{ref}:./dvc.lock") == lock), None)


def changed_params(values: Mapping[str, Any], architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters, and fields of the architecture, whose values differ from the baseline commit's.

    The baseline is the commit that DVC names, or else HEAD. Nothing is compared outside of a Git repository.
    """
    before = _committed("params.yaml")
    changes = _different(_flat(shaping(values)), _flat(shaping(before)))
    if "model.config" not in changes:
        changes |= _different(dict(architecture), _committed(values["model"]["config"]))
    return changes


def shaping(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that shape results: all but `runtime`."""
    return {name: section for name, section in values.items() if name != "runtime"}


def _committed(path: str) -> dict[str, Any]:
    """Return what the baseline commit's file (YAML, or JSON, which is YAML) holds; nothing where it has none."""
    text = git("show", f"{os.environ.get('DVC_EXP_BASELINE_REV') or 'HEAD'}:./{path}")
    try:
        values = YAML(typ="safe").load(text) if text else {}
    except YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _different(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in now.items() if name in before and before[name] != value}


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by `section.key`."""
    flat: dict[str, Any] = {}
    for section, values in sections.items():
        inner = {f"{section}.{key}": value for key, value in values.items()} if isinstance(values, dict) else None
        flat |= {section: values} if inner is None else inner
    return flat

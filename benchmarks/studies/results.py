"""The results of a study's runs: read from Aim, and compared with DVC's.

Aim knows the runs of a study and keeps their curves. It is read from a copy without its index, for only `aim up` fills
that, and a training may be writing. DVC holds the metrics of each experiment in a commit; where the two disagree the
report is refused.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.errors import UserError

Curve = Mapping[int, float]
"""Value by optimizer step."""


@dataclass(frozen=True)
class Result:
    """One finished run."""

    name: str
    variant: str
    seed: int
    validation_loss: float
    """Nats per token on the validation text, after the last step."""
    nats_per_char: float
    """On the held-out text."""
    bits_per_byte: float
    """On the held-out text."""
    max_vio: float
    """Worst layer, over the held-out text."""
    max_vio_batch: float
    """Worst layer, over the last batches of the training."""
    dead_experts: int
    """Experts without a token of the held-out text."""
    tokens_per_s: float
    num_parameters: int
    num_active: int
    """Parameters that a token uses."""
    num_embedding: int
    """Parameters of which a token reads one row and multiplies with none: the embedding's, unless it is the head."""
    num_steps: int
    num_tokens: int
    num_epochs: float
    computed: str
    """How linear layers multiplied, emulations labelled."""
    conditions: str
    """Commit, text, and versions."""
    losses: Curve
    """Training, nats per token, each the mean since the one before."""
    validation_losses: Curve


def read_results(root: Path, experiment: str, names: Mapping[str, tuple[str, int]]) -> list[Result]:
    """Return the finished runs of `experiment` among `names` from `root`/.aim, in the order of `names`.

    Of several runs of one name the latest counts. Raises `UserError` where there is no Aim repository.
    """
    if not (root / ".aim" / "VERSION").is_file():
        raise UserError(f"{root / '.aim'}: no Aim repository; run the study first, or name the folder that has one")
    found: dict[str, tuple[float, Result]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(
            root / ".aim", Path(folder) / ".aim", ignore=shutil.ignore_patterns("index", "LOCK"), copy_function=_copy
        )
        from aim import Repo

        for run in Repo.from_path(folder).iter_runs():
            facts: Any = run.get("dvc") or {}
            name = facts.get("exp_name")
            is_ours = run.experiment == experiment and name in names
            if is_ours and run.get("status") == "finished" and run.get("evaluate"):
                known = found.get(name, (0.0, None))
                if run.creation_time >= known[0]:
                    found[name] = (run.creation_time, _result(run, name, *names[name]))
    return [found[name][1] for name in names if name in found]


def _copy(source: str, destination: str) -> None:
    """Copy a file, unless it has just vanished: a database that is being written replaces its files."""
    try:
        shutil.copy2(source, destination)
    except FileNotFoundError:
        return


def _result(run: Any, name: str, variant: str, seed: int) -> Result:
    """Return what the Aim run holds."""
    keys = ("train", "evaluate", "size", "dvc", "env", "architecture")
    train, evaluate, size, dvc, env, architecture = (run[key] for key in keys)
    heldout, router = evaluate["heldout"], evaluate["router"]
    if not router:
        raise UserError(f"{name}: its model has no router, and a study compares their loads; leave {variant} out of it")
    curves = _curves(run)
    last_batches = [list(curve.values())[-1] for (name, *_), curve in curves.items() if name == "max_vio"]
    return Result(
        name=name,
        variant=variant,
        seed=seed,
        validation_loss=train["validation"]["loss"],
        nats_per_char=heldout["nats_per_char"],
        bits_per_byte=heldout["bits_per_byte"],
        max_vio=router["max_vio_global_max"],
        max_vio_batch=max(last_batches),
        dead_experts=router["dead_experts"],
        tokens_per_s=train["tokens_per_s"],
        num_parameters=size["parameters_total"],
        num_active=size["parameters_active"],
        num_embedding=0
        if architecture["tie_word_embeddings"]
        else architecture["vocab_size"] * architecture["hidden_size"],
        num_steps=train["step"],
        num_tokens=train["tokens_seen"],
        num_epochs=train["epoch"],
        computed=f"{train['precision']}, {train['experts']} on {train['device']}",
        conditions=f"commit `{(dvc['git_sha'] or 'unknown')[:7]}`, text `{dvc['data_source']}` (SHA-256 "
        f"`{(dvc['corpus_sha256'] or 'unknown')[:8]}`), torch {env['torch']}",
        losses=curves["loss", "train", None],
        validation_losses=curves["loss", "val", None],
    )


def _curves(run: Any) -> dict[tuple[str, str | None, int | None], Curve]:
    """Return what was recorded during the training by (name, subset, layer)."""
    curves: dict[tuple[str, str | None, int | None], Curve] = {}
    for metric in run.metrics():
        context = metric.context.to_dict()
        if "stage" not in context:
            steps, (values, *_) = metric.data.numpy()
            curve = dict(zip(steps.astype(int).tolist(), values.tolist(), strict=True))
            curves[metric.name, context.get("subset"), context.get("layer")] = dict(sorted(curve.items()))
    return curves


def checked_with_dvc(root: Path, results: list[Result]) -> dict[str, str]:
    """Return the commit messages of the experiments, by name, that agree with `results`; others are not in DVC here.

    Raises `UserError` where an experiment's own metrics say something else than Aim.
    """
    refs = _git(root, "for-each-ref", "--sort=committerdate", "--format=%(objectname) %(refname)", "refs/exps")
    commits = {line.rsplit("/", 1)[1]: line.split()[0] for line in refs.splitlines()}  # the latest of a name
    messages: dict[str, str] = {}
    for result in results:
        if result.name in commits:
            commit = commits[result.name]
            truth = _heldout_loss(root, result.name, commit)
            if truth != result.nats_per_char:
                raise UserError(
                    f"{result.name}: Aim holds {result.nats_per_char} nats/char, DVC {truth}; DVC is the truth: "
                    f"dvc exp apply {result.name}, then python -m dsv3.tracking.rebuild"
                )
            messages[result.name] = _git(root, "show", "--no-patch", "--format=%B", commit).strip()
    return messages


def _heldout_loss(root: Path, name: str, commit: str) -> float:
    """Return the held-out loss that an experiment's commit holds; `UserError` where it is of an older layout."""
    path = "results/evaluate/headline.json"
    if path not in _git(root, "ls-tree", "--name-only", commit, path).splitlines():
        raise UserError(f"{name}: has no {path}, so it was made by older code; dvc exp remove {name}, and run it again")
    return json.loads(_git(root, "show", f"{commit}:{path}"))["heldout"]


def _git(root: Path, *arguments: str) -> str:
    """Return what git prints in `root`."""
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout

"""The parameters and models that tests start from: the project's, whatever a run or an experiment left here.

`make repro` and `dvc exp run -S` write results, dvc.lock, params.yaml and the models' configurations, and the first
thing that README advises is to commit them. A test that read them would ask whether the pipeline has run, and with
which values. So conftest.py refuses to open those of the working tree, and tests take the values of the last commit
that changed README, as a baseline of the project does (test_baseline.py asks), or what may be a parameter; a baseline
of yours changes neither.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from dsv3.params.architecture import Architecture
from dsv3.params.read import Params, read_params

ROOT = Path(__file__).resolve().parents[1]
MODELS = tuple(f"mini_model/{name}" for name in ("config.json", "config_tiny.json", "config_nano.json"))
RUNS_WRITE = (
    "results",
    "outputs",
    "data",
    "runs",
    "wandb",
    ".aim",
    ".trackio",
    ".checkpoints",
    "dvc.lock",
    "params.yaml",
    *MODELS,
)
"""Files and folders of the working tree that no test may read."""


_ENVIRONMENT = dict(os.environ)  # a commit's hook names the commit's index there


def git(*arguments: str) -> str:
    """What Git says of this repository."""
    command, environment = ["git", *arguments], _ENVIRONMENT
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=True)
    return done.stdout


def _last_or_next_commit(*names: str) -> str:
    is_next = git("diff", "--cached", "--name-only", "--", *names)
    return "" if is_next else git("log", "-1", "--format=%H", "--", *names).strip()


def committed_text(name: str, revision: str = "") -> str:
    """The text of a file in a commit, or, without a revision, in the index."""
    return git("show", f"{revision}:{name}")


BASELINE = _last_or_next_commit("README.md", "dsv3/params")
"""The commit whose values are the project's; empty, which is the next one, where that changes one of these."""


def is_written(name: str) -> bool:
    """Whether a run or an experiment writes the file of that name."""
    return any(name == each or name.startswith(f"{each}/") for each in RUNS_WRITE)


def _first_valid(name: str, section: type[BaseModel]) -> str:
    """The project's values, or, where the code has come to ask for others, those that are being made for it."""
    for text in (committed_text(name, BASELINE), committed_text(name)):
        with contextlib.suppress(ValidationError):
            section.model_validate(YAML(typ="safe").load(text))
            return text
    return (ROOT / name).read_text(encoding="utf-8")


def _project(folder: Path) -> Path:
    """Write params.yaml and mini_model; the model's code is the working tree's."""
    shutil.copytree(ROOT / "mini_model", folder / "mini_model", ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    for name, section in {"params.yaml": Params, **dict.fromkeys(MODELS, Architecture)}.items():
        (folder / name).write_text(_first_valid(name, section), encoding="utf-8")
    return folder


_FOLDER = tempfile.TemporaryDirectory(prefix="dsv3-project-")
PROJECT = _project(Path(_FOLDER.name))
"""A folder with params.yaml and mini_model, to copy from and to run commands in."""

with contextlib.chdir(PROJECT):
    DEFAULTS = read_params(Path("params.yaml"))
"""The parameters of `PROJECT`."""


def refuse_what_runs_write(event: str, arguments: tuple) -> None:
    """Raise where a test opens a file of the working tree that a run writes; an audit hook."""
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        given, mode = os.fsdecode(arguments[0]), arguments[1]
        path = os.path.realpath(given)
        # Without a mode it is os.open, which shutil.rmtree gives a folder's bare name, relative to another folder.
        is_of_rmtree = not (mode or Path(given).is_absolute() or Path(path).is_file())
        if path.startswith(f"{ROOT}{os.sep}") and not is_of_rmtree:
            name = path[len(str(ROOT)) + 1 :]
            assert not is_written(name), f"a test opens the working tree's {name}; tests.committed has Git's"

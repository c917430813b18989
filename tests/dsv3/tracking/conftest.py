import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from dsv3.params.read import Params
from dsv3.tracking.identity import RunIdentity, run_identity
from tests.committed import DEFAULTS, PROJECT

collect_ignore = (
    [] if importlib.util.find_spec("aim") else ["test_aim.py", "test_rebuild.py", "test_views.py"]
)  # from Python 3.13 on


@pytest.fixture
def params() -> Params:
    return DEFAULTS


@pytest.fixture
def identity(params, monkeypatch) -> RunIdentity:
    monkeypatch.setenv("DVC_EXP_NAME", "union-brig")
    data = {"sha256": "d" * 64, "corpus": {"source": "plays", "sha256": "c" * 64}}
    architecture = {"n_routed_experts": 8, "rope_scaling": {"type": "yarn"}}
    env = {"device": "cpu", "precision": "bf16"}
    return run_identity(params, "f" * 64, architecture, data, {"parameters": 5}, env)


@pytest.fixture(scope="session")
def empty_repository(tmp_path_factory) -> Path:
    """An Aim repository without runs; making one takes a second, copying one does not."""
    from dsv3.tracking.aim import initialize

    root = tmp_path_factory.mktemp("aim")
    initialize(str(root))
    return root


@pytest.fixture
def project(bare_project, empty_repository) -> Path:
    """A DVC root with an Aim repository that holds no runs."""
    shutil.copytree(empty_repository / ".aim", bare_project / ".aim")
    return bare_project


@pytest.fixture(scope="session")
def committed_project(tmp_path_factory) -> Path:
    """A Git repository whose last commit holds the parameters and models that experiments are compared with."""
    root = tmp_path_factory.mktemp("committed") / "project"
    shutil.copytree(PROJECT, root)
    author = ["-c", "user.name=n", "-c", "user.email=e@x"]
    for arguments in (["init"], ["add", "."], [*author, "commit", "-m", "baseline"]):
        subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True)
    return root


@pytest.fixture
def bare_project(tmp_path, monkeypatch, committed_project) -> Path:
    """A repository without results, which is where .aim and runs/ go, and which later stages run in."""
    root = tmp_path / "project"
    shutil.copytree(committed_project, root)
    monkeypatch.chdir(root)
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.delenv("DVC_STAGE", raising=False)
    return root


@pytest.fixture
def indexed(tmp_path):
    """Return a function that opens a copy of an Aim repository without the index, which only `aim up` would fill."""

    def read(root: Path):
        from aim import Repo

        copy = tmp_path / f"copy_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(root / ".aim", copy / ".aim", ignore=shutil.ignore_patterns("index", "LOCK"))
        return Repo.from_path(str(copy))

    return read

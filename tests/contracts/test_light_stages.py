"""The stages that prepare the ground really run without torch: minutes of import would be paid for nothing."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.committed import PROJECT
from tests.contracts.import_closure import ROOT
from tests.dvc_yaml import STAGES, arguments_of

RUN = """
import runpy, sys
name, *arguments = sys.argv[1:]
sys.argv = [name, *arguments]
try:
    runpy.run_module(name, run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
print("imported:", *sorted({"torch", "transformers", "accelerate", "aim"} & set(sys.modules)))
"""


CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
LIGHT = {name for rule in CONTRACTS if "torch" in rule.get("forbidden_modules", ()) for name in rule["source_modules"]}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a text of its own; the stages run in the order of dvc.yaml, each on what the last one wrote."""
    folder = shutil.copytree(PROJECT, tmp_path_factory.mktemp("light") / "project")
    (folder / "text.txt").write_text("To be, or not to be: that is the question.\n" * 400)
    yaml = YAML()
    params = yaml.load((folder / "params.yaml").read_text(encoding="utf-8"))
    params["data"].update(source="file", path="text.txt")
    params["tokenize"]["vocab_size"] = 300
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    return folder


@pytest.mark.parametrize("name", [name for name in STAGES if f"stages.{name}" in LIGHT])
def test_a_light_stage_runs_without_torch(workspace: Path, name: str):
    result = subprocess.run(
        [sys.executable, "-c", RUN, f"stages.{name}", *arguments_of(STAGES[name])],
        cwd=workspace,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "imported:"


def test_the_light_stages_are_stages():
    assert LIGHT and {f"stages.{name}" for name in STAGES} >= LIGHT

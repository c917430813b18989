"""What others' machines do with this repository: hosted CI, a container for development, a notebook."""

import json
import re
import tomllib

import pytest
from packaging.specifiers import SpecifierSet
from ruamel.yaml import YAML

from tests.contracts.import_closure import ROOT
from tests.contracts.test_tree import TEXTS

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.y*ml"))
STEPS = [
    step
    for path in WORKFLOWS
    for job in YAML(typ="safe").load(path.read_text(encoding="utf-8"))["jobs"].values()
    for step in job["steps"]
]
PYTHONS = SpecifierSet(tomllib.loads(TEXTS["pyproject.toml"])["project"]["requires-python"])


def test_every_action_is_named_by_its_commit():
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name)] == []


def test_hosted_ci_runs_what_ci_runs_and_looks_for_advisories():
    commands = {step["run"] for step in STEPS if "run" in step}
    assert commands == {"sh .ci/run", "sh .ci/audit"}
    assert (
        "pip-audit --strict" in TEXTS["Makefile"]
    )  # which .ci/audit runs: a package that can't be looked up is a failure
    content = YAML(typ="safe").load(WORKFLOWS[0].read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    assert content["on"]["schedule"]


def test_hosted_ci_and_the_container_have_a_python_that_the_project_takes():
    versions = [step["with"]["python-version"] for step in STEPS if "python-version" in step.get("with", {})]
    content = YAML(typ="safe").load(WORKFLOWS[0].read_text(encoding="utf-8"))
    versions += content["jobs"]["test"]["strategy"]["matrix"]["python"]
    versions += re.findall(
        r"^FROM python:([\d.]+)", (ROOT / ".devcontainer/Dockerfile").read_text(), flags=re.MULTILINE
    )
    assert [each for each in versions if "matrix" not in each and each not in PYTHONS] == []
    assert len(versions) >= 4


def test_the_container_runs_a_target_of_the_makefile():
    content = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    assert re.search(rf"^{content['postCreateCommand'].removeprefix('make ')}:", TEXTS["Makefile"], flags=re.MULTILINE)
    assert (ROOT / ".devcontainer" / content["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_holds_no_output_of_anyones_machine(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []

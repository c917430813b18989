"""What is declared is what is imported or run, and every version that pip may take is pinned."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.contracts.import_closure import ROOT
from tests.contracts.test_tree import TEXTS

GROUPS = tomllib.loads(TEXTS["pyproject.toml"])["dependency-groups"]
OURS = {"dsv3", "stages", "mini_model", "benchmarks", "tests"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
DISTRIBUTIONS = {"markdown_it": "markdown-it-py", "PIL": "pillow", "ruamel": "ruamel.yaml"}
"""Imported names that are not the distribution's."""

NOT_IMPORTED = {
    "basedpyright": "a command of make check",
    "import-linter": "a command of make check",
    "pip": "what the Makefile installs with",
    "pre-commit": "a command that runs make check's before each commit",
    "pytest-xdist": "pytest's option --numprocesses",
    "ruff": "a command of make check",
    "tensorboard": "what torch.utils.tensorboard writes with",
}
BROUGHT_ALONG = {"triton": "comes with torch's CUDA build, and is used on a GPU only"}
"""Imported by the pipeline where it is there."""


@cache
def requirements(group: str) -> dict[str, list[Requirement]]:
    """The requirements of a group, and of those that it includes, by name; a name may have several, of two markers."""
    found: dict[str, list[Requirement]] = {}
    for entry in GROUPS[group]:
        if isinstance(entry, dict):
            for name, included in requirements(entry["include-group"]).items():
                found.setdefault(name, []).extend(included)
        else:
            found.setdefault(canonicalize_name(Requirement(entry).name), []).append(Requirement(entry))
    return found


def foreign(package: str) -> dict[str, str]:
    """The distributions that a package of ours imports, each with a file that does."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        for name in modules(ast.parse(path.read_text(encoding="utf-8"))):
            if name not in OURS and name not in sys.stdlib_module_names:
                found[canonicalize_name(DISTRIBUTIONS.get(name, name))] = path.relative_to(ROOT).as_posix()
    return found


def modules(tree: ast.Module) -> Iterator[str]:
    """The top-level names of all that is imported from outside of the file's package, by name at run time too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (name.value for name in node.args if isinstance(name, ast.Constant))


PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", TEXTS["constraints.txt"], flags=re.MULTILINE)
}


@pytest.mark.parametrize(
    ("package", "groups"),
    [
        ("mini_model", ["pipeline"]),
        ("dsv3", ["pipeline", "wandb", "trackio"]),
        ("stages", ["pipeline"]),
        ("benchmarks", ["pipeline", "dev"]),
        ("tests", ["pipeline", "dev", "ui"]),
    ],
)
def test_what_is_imported_is_declared(package: str, groups: list[str]):
    declared = {name for group in groups for name in requirements(group)} | set(BROUGHT_ALONG)
    assert {name: file for name, file in foreign(package).items() if name not in declared} == {}


@pytest.mark.parametrize(
    ("group", "packages"),
    [
        ("pipeline", ["mini_model", "dsv3", "stages"]),
        ("dev", ["tests"]),
        ("tensorboard", ["tests"]),
        ("ui", ["tests"]),
        ("wandb", ["dsv3"]),
        ("trackio", ["dsv3"]),
    ],
)
def test_what_is_declared_is_imported_or_run(group: str, packages: list[str]):
    imported = {name for package in packages for name in foreign(package)}
    assert sorted(set(requirements(group)) - imported - set(NOT_IMPORTED)) == []


def test_what_is_excused_is_declared_and_not_imported_by_the_pipeline():
    declared = {name for group in GROUPS for name in requirements(group)}
    assert set(NOT_IMPORTED) | set(BROUGHT_ALONG) <= declared
    assert set(NOT_IMPORTED) & (set(foreign("dsv3")) | set(foreign("stages")) | set(foreign("mini_model"))) == set()


@pytest.mark.parametrize("group", GROUPS)
def test_every_requirement_has_a_pin_in_its_range(group: str):
    for name, declared in requirements(group).items():
        for requirement in declared:
            assert name in PINS, f"{name} has no pin; CONTRIBUTING.md has the command"
            assert requirement.specifier.contains(PINS[name]), f"{name}=={PINS[name]} is not {requirement.specifier}"


def test_every_package_has_one_pin_and_none_is_a_build_of_one_machine():
    names = re.findall(r"^([\w.-]+)==", TEXTS["constraints.txt"], flags=re.MULTILINE)
    assert len(names) == len(PINS) == len(set(names))
    assert [pin for pin in PINS.items() if "+" in pin[1]] == []
    assert [name for name in PINS if name.startswith(("nvidia-", "cuda-"))] == []


def test_the_pins_were_made_by_the_command_that_contributing_tells():
    header = re.match(r"# .*\n#    (uv pip compile .*)\n", TEXTS["constraints.txt"])
    assert header
    assert f"\n{header[1]}\n" in TEXTS["CONTRIBUTING.md"]
    assert {f"--group {group}" for group in ("pipeline", "dev", "ui", "wandb", "trackio")} <= set(
        re.findall(r"--group \w+", header[1])
    )
    assert "://" not in TEXTS["constraints.txt"]  # of a registry


def test_the_oldest_python_is_the_same_wherever_it_is_named():
    project = tomllib.loads(TEXTS["pyproject.toml"])
    oldest = re.match(r">=(3\.\d+)", project["project"]["requires-python"])
    assert oldest
    assert project["tool"]["ruff"]["target-version"] == "py" + oldest[1].replace(".", "")
    assert project["tool"]["basedpyright"]["pythonVersion"] == oldest[1]
    assert f"--python-version {oldest[1]} " in TEXTS["constraints.txt"]
    assert f"for name in python{oldest[1]} " in TEXTS["Makefile"]

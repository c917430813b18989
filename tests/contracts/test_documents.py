"""What the documents promise exists: links, commands, parameters, files."""

import ast
import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from dsv3.params.read import read_params, schema_text
from tests.committed import PROJECT
from tests.contracts import tour
from tests.contracts.import_closure import ROOT
from tests.contracts.package_graph import names_left_out, picture
from tests.contracts.test_tree import TEXTS

PAGES = sorted(name for name in TEXTS if name.endswith(".md"))
PARAMS = YAML(typ="safe").load(TEXTS["params.yaml"])
STAGES = YAML(typ="safe").load(TEXTS["dvc.yaml"])["stages"]
PACKAGES = ("stages", "dsv3", "mini_model", "benchmarks", "tests")


def commands(page: str) -> list[str]:
    """Every line of the page's shell blocks and every span of code, which is where commands stand."""
    text = TEXTS[page]
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchor(heading: str) -> str:
    """The name that a Markdown renderer gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        destination = (ROOT / page).parent / path if path else ROOT / page
        assert destination.exists(), f"{page} links to {target}"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", destination.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str):
    targets = set(re.findall(r"^([a-z-]+):", TEXTS["Makefile"], flags=re.MULTILINE))
    for command in commands(page):
        if words := re.match(r"make ([a-z -]+)$", command):
            assert set(words[1].split()) <= targets, f"{page}: {command}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_are_run_exist(page: str):
    for command in commands(page):
        for module in re.findall(rf"python -m ((?:{'|'.join(PACKAGES)})\.[a-z_0-9.]+)", command):
            path = ROOT.joinpath(*module.split("."))
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page}: {command}"


@pytest.mark.parametrize("page", PAGES)
def test_parameters_that_are_set_exist(page: str):
    for command in commands(page):
        words = shlex.split(command, posix=True) if " -S " in command else []
        for flag, assignment in pairwise(words):
            if flag != "-S":
                continue
            key = assignment.split("=")[0]
            if ":" in key:
                assert f'"{key.split(":")[1]}"' in TEXTS[key.split(":")[0]], f"{page}: {command}"
                continue
            value = PARAMS
            for part in key.split("."):
                assert part in value, f"{page}: {command}"
                value = value[part]


@pytest.mark.parametrize("page", PAGES)
def test_values_that_are_set_are_valid_together(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in for running the experiment, which would train: what `-S` sets is validated as every stage would."""
    for number, command in enumerate(commands(page)):
        words = shlex.split(command, posix=True) if " -S " in command and "presets" not in command else []
        if "-S" not in words:
            continue
        folder = shutil.copytree(PROJECT, tmp_path / str(number))
        monkeypatch.chdir(folder)
        for flag, assignment in pairwise(words):
            if flag == "-S":
                key, _, value = assignment.partition("=")
                file, _, path = key.rpartition(":")
                first = value if value.startswith("[") else value.split(",")[0]  # of several experiments
                set_value(folder / (file or "params.yaml"), path.split("."), first)
        read_params(Path("params.yaml"))


def set_value(file: Path, path: list[str], value: str) -> None:
    """Change one value of a YAML or JSON file (JSON is YAML), as `dvc exp run -S` does."""
    yaml = YAML(typ="safe")
    values = target = yaml.load(file.read_text())
    for section in path[:-1]:
        target = target[section]
    target[path[-1]] = yaml.load(value)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("page", PAGES)
def test_stages_that_are_run_exist(page: str):
    for command in commands(page):
        for stage in re.findall(r"^dvc repro(?: -\S+)* ([a-z]\w*)", command):
            assert stage in STAGES, f"{page}: {command}"


def defined(names: list[str]) -> bool:
    """Whether a dotted name leads to a package, a module, or a definition within one."""
    for length in range(len(names), 0, -1):
        path = ROOT.joinpath(*names[:length])
        if path.is_dir():
            return length == len(names)
        if path.with_suffix(".py").is_file():
            body = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8")).body
            for name in names[length:]:
                found = [node for node in body if name in _names(node)]
                if not found:
                    return False
                body = getattr(found[0], "body", [])
            return True
    return False


def _names(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [getattr(node, "name", ""), *(target.id for target in targets if isinstance(target, ast.Name))]


@pytest.mark.parametrize("page", PAGES)
def test_code_that_is_named_exists(page: str):
    named = re.findall(r"`((?:dsv3|mini_model|stages)\.[\w.]+)`", TEXTS[page])
    assert [name for name in named if not defined(name.split("."))] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str):
    named = re.findall(r"`((?:dsv3|mini_model|stages|tests|configs|presets|docs|benchmarks)/[\w./]+)`", TEXTS[page])
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_exist(page: str):
    sources = "".join(text for name, text in TEXTS.items() if name.startswith("tests/") and name.endswith(".py"))
    named = (
        re.findall(r"`(test_\w+)`", TEXTS[page]) if page != "docs/log.md" else []
    )  # the log names others' tests, too
    assert [name for name in named if f"def {name}(" not in sources] == []


def test_the_readme_starts_with_two_commands():
    first_block = re.search(r"```bash\n(.*?)```", TEXTS["README.md"], flags=re.DOTALL)
    assert first_block
    assert [line.split("#")[0].strip() for line in first_block[1].splitlines()] == ["make repro", "make test"]


def test_the_picture_of_the_packages_is_that_of_their_imports():
    assert picture() in TEXTS["docs/architecture.md"], "python -m tests.contracts.package_graph draws it again"


def test_the_modules_that_the_picture_leaves_out_are_named_beside_it():
    sentence = f"left out, and so are\n{names_left_out()}, which everyone may import."
    assert sentence in TEXTS["docs/architecture.md"], "python -m tests.contracts.package_graph lists them again"


def test_the_tour_shows_what_the_commands_print_of_the_runs_that_it_recorded():
    assert tour.page(json.loads(TEXTS["docs/tour.json"])) == TEXTS["docs/tour.md"], "python -m tests.contracts.tour"


def test_the_changelog_has_a_place_for_the_next_change():
    assert "## Unreleased" in TEXTS["CHANGELOG.md"]


def test_the_editors_schema_is_that_of_the_classes():
    assert TEXTS["docs/params.schema.json"] == schema_text(), "write it again: python -m dsv3.doctor --write-schema"

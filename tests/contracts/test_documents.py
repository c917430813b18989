"""What the documents promise exists: links, commands, parameters, files."""

import re
import shlex

import pytest
from ruamel.yaml import YAML

from tests.contracts.import_closure import ROOT
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
    targets = set(re.findall(r"^([a-z]+):", TEXTS["Makefile"], flags=re.MULTILINE))
    for command in commands(page):
        if words := re.match(r"make ([a-z ]+)$", command):
            assert set(words[1].split()) <= targets, f"{page}: {command}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_are_run_exist(page: str):
    for command in commands(page):
        for module in re.findall(rf"python -m ((?:{'|'.join(PACKAGES)})\.[a-z_0-9.]+)", command):
            assert ROOT.joinpath(*module.split(".")).with_suffix(".py").is_file(), f"{page}: {command}"


@pytest.mark.parametrize("page", PAGES)
def test_parameters_that_are_set_exist(page: str):
    for command in commands(page):
        words = shlex.split(command, posix=True) if " -S " in command else []
        for flag, assignment in zip(words, words[1:], strict=False):
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
def test_stages_that_are_run_exist(page: str):
    for command in commands(page):
        for stage in re.findall(r"^dvc repro(?: -\S+)* ([a-z]\w*)", command):
            assert stage in STAGES, f"{page}: {command}"


def test_the_readme_starts_with_two_commands():
    first_block = re.search(r"```bash\n(.*?)```", TEXTS["README.md"], flags=re.DOTALL)
    assert first_block
    assert [line.split("#")[0].strip() for line in first_block[1].splitlines()] == ["make repro", "make test"]


def test_the_changelog_has_a_place_for_the_next_change():
    assert "## Unreleased" in TEXTS["CHANGELOG.md"]

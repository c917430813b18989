"""The code keeps its own rules: budgets, notation, imports, words."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from dsv3.params.data import REQUIRED_KEY
from dsv3.params.optimizers import OPTIMIZERS
from dsv3.scores import SCORES
from dsv3.tracking.metrics import METRICS
from mini_model.validation_deepseek import VARIANTS
from tests.committed import committed_text, git, is_written
from tests.contracts.import_closure import ROOT

SOURCES = sorted(path for package in ("dsv3", "stages", "mini_model") for path in (ROOT / package).rglob("*.py"))
TRACKED = [name for name in git("ls-files").splitlines() if (ROOT / name).is_file() or is_written(name)]
TEXTS = {
    name: committed_text(name) if is_written(name) else (ROOT / name).read_text(encoding="utf-8")
    for name in TRACKED
    if (ROOT / name).suffix in {"", ".py", ".md", ".yaml", ".toml", ".json", ".txt"}
    and name != "dvc.lock"  # `dvc repro` puts it into the index
}
STAGE_NAMES = list(YAML(typ="safe").load(TEXTS["dvc.yaml"])["stages"])
MODEL_FILES = ["configuration_deepseek.py", "modeling_deepseek.py", "validation_deepseek.py"]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_function_fits_on_a_screen(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            limit = 70 if path.name == "modeling_deepseek.py" else 50
            assert length <= limit, f"{node.name} has {length} lines"


def test_package_files_are_empty():
    # One that re-exports would make every stage depend on the whole package.
    assert [named(p) for p in SOURCES if p.name == "__init__.py" and p.stat().st_size] == []


@pytest.mark.parametrize("name", MODEL_FILES)
def test_the_shipped_files_need_only_torch_and_transformers(name: str):
    tree = ast.parse((ROOT / "mini_model" / name).read_text(encoding="utf-8"))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level
    }
    assert imported - set(sys.stdlib_module_names) <= {"torch", "transformers"}


def test_every_metric_of_the_vocabulary_is_computed_somewhere():
    # That every column is in the vocabulary, the recorder checks.
    sources = [path for path in SOURCES if "tracking" not in path.parts]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
    named = {word for text in texts if isinstance(text, str) for word in re.findall(r"\w+", text)}
    assert [name for name in METRICS if name not in named] == []


ROWS = {
    "tests/mini_model/test_router.py": VARIANTS["scoring_func"] + VARIANTS["topk_method"],
    "tests/dsv3/training/test_optimizer.py": tuple(OPTIMIZERS),
    "tests/dsv3/test_scores.py": tuple(SCORES),
    "tests/dsv3/data/test_": tuple(REQUIRED_KEY),  # or in the test of its module
}
"""Beginning of the names of the tests -> the rows of a table that they ask about."""


@pytest.mark.parametrize(("beginning", "row"), [(tests, row) for tests, rows in ROWS.items() for row in rows])
def test_every_row_to_which_a_recipe_leads_is_named_in_its_tests(beginning: str, row: str):
    tests = [text for name, text in TEXTS.items() if name.startswith(beginning)]
    assert any(re.search(rf"[\"']{row}[\"']", text) for text in tests), f"no {beginning}* names {row}"


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_every_stage_has_its_tests(name: str):
    assert f"tests/stages/test_{name}.py" in TEXTS


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_help_imports_nothing_heavy(name: str):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['stages.{name}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('stages.{name}', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'aim', 'datasets', 'tokenizers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--dry-run" in result.stdout


def test_nothing_is_left_unfinished():
    marker = re.compile("TO" + "DO|FIX" + "ME|X" + "XX|raise NotImplemented" + "Error")
    assert [name for name, text in TEXTS.items() if name.endswith(".py") and marker.search(text)] == []


def test_no_large_file_is_tracked():
    sizes = {name: (ROOT / name).stat().st_size for name in TRACKED if not is_written(name)}
    sizes |= {name: int(git("cat-file", "-s", f":{name}")) for name in TRACKED if is_written(name)}
    assert [name for name, size in sizes.items() if size > 1 << 20] == []


def test_no_path_of_a_machine_is_named():
    # Whoever reads it has another one.
    path = re.compile(r"(^|[^\w.~])/(root|home|Users|work)/")
    assert [name for name in TEXTS if path.search(TEXTS[name])] == []


@pytest.mark.parametrize("name", [".venv", "outputs", ".aim", ".checkpoints", "runs", "wandb", ".trackio", "data"])
def test_a_link_is_ignored_like_the_folder_it_leads_to(name: str, tmp_path: Path):
    (tmp_path / ".gitignore").write_text(TEXTS[".gitignore"], encoding="utf-8")
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to("elsewhere")
    assert subprocess.run(["git", "check-ignore", "-q", name], cwd=tmp_path, check=False).returncode == 0


def test_few_type_errors_are_excused():
    excused = [line for path in SOURCES for line in path.read_text(encoding="utf-8").splitlines() if "ignore[" in line]
    assert len(excused) <= 10, excused

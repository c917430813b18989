"""What counts as the code behind a result, and what a digest of its syntax leaves out."""

import shutil
from pathlib import Path

import pytest

from dsv3.dependencies import (
    PACKAGES,
    ROOT,
    TRAIN_VIEWS,
    VIEWS,
    canonical,
    dependencies,
    is_view,
    syntax_digest,
    syntax_digests,
)

TRAIN = dependencies("train")
SOURCE = """
class Rows(Base):
    count: int = 1

    def add(self, *others: int, scale: float = 0.5, **rest: str) -> str:
        if not (others and scale >= 1e-3):
            raise ValueError(f"{self.count!r:>{scale}} of " f"{others}" " rows")
        return {**rest, "a": None, "b": b"\\x00", "c": 'é'}["a"][1:, ...]
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the code."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return tmp_path


@pytest.mark.parametrize("name", TRAIN)
def test_a_comment_in_a_dependency_of_train_changes_no_digest_and_code_changes_its_own(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    commented = text.replace("\n\n\n", "\n\n\n# Another comment.\n\n\n") + "\n# The last one.\n"
    assert commented.count("\n") > text.count("\n")
    assert syntax_digest(commented) == syntax_digest(text)
    assert syntax_digest(f"{text}\nANOTHER = 1\n") != syntax_digest(text)


def test_the_digests_are_read_from_the_files_by_name(tree: Path):
    before = syntax_digests(TRAIN, tree)
    assert list(before) == TRAIN
    assert before == syntax_digests(TRAIN)
    loop = tree / "dsv3/training/loop.py"
    loop.write_text(loop.read_text(encoding="utf-8").replace("1_000_003", "1_000_033"), encoding="utf-8")
    changed = syntax_digests(TRAIN, tree)
    assert [name for name in TRAIN if changed[name] != before[name]] == ["dsv3/training/loop.py"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("x = 1_000", "x = 1000  # a thousand"),
        ("x = 'a'", 'x = "a"'),
        ("f(a, b)", "f(\n    a,\n    b,\n)"),
        ("def f():\n    'What it does.'\n    return 1", "def f():\n    return 1"),
        ("class A:\n    x: int\n    'What it is.'", "class A:\n    x: int"),
        ("x = f'{a}' 'b' 'c'", "x = f'{a}bc'"),
        ("x = (a + b) * c", "x = ((a + b)) * c"),
        ("x = u'a'", "x = 'a'"),
    ],
)
def test_another_way_to_write_the_same_has_the_same_digest(first: str, second: str):
    assert syntax_digest(first) == syntax_digest(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("x = 1", "x = 1.0"),
        ("x = 1", "x = True"),
        ("x = '1'", "x = 1"),
        ("x = b'a'", "x = 'a'"),
        ("x = None", "x = ''"),
        ("return_ = f('a')", "return_ = f()"),
        ("def f(a=None): ...", "def f(a): ..."),
        ("def f(*, a, b=1): ...", "def f(*, a=1, b): ..."),
        ("x = {**a, 'b': c}", "x = {None: a, 'b': c}"),
        ("x = f'{a}'", "x = f'{a!r}'"),
        ("x = a < b", "x = a <= b"),
        ("def f():\n    return", "def f():\n    yield"),
        ("from a import b", "from .a import b"),
        ("if a:\n    b()\nc()", "if a:\n    b()\n    c()"),
    ],
)
def test_what_says_something_else_has_another_digest(first: str, second: str):
    assert syntax_digest(first) != syntax_digest(second)


def test_the_digest_is_the_same_on_every_version_of_python():
    # Computed by 3.10, 3.11, 3.12 and 3.13, which agree on every file of the repository as well.
    assert syntax_digest(SOURCE) == "ae975f723f4c2100"


def test_the_walk_follows_imports_within_functions_and_stops_at_views(tmp_path: Path):
    files = {
        "stages/train.py": "def main():\n    from dsv3.training import loop\n    import dsv3.tracking.recorder",
        "dsv3/training/loop.py": "from .inner.step import go\nimport torch",
        "dsv3/training/inner/step.py": "from .. import sibling",
        "dsv3/training/sibling.py": "",
        "dsv3/training/unused.py": "",
        "dsv3/tracking/recorder.py": "import dsv3.only_for_trackers",
        "dsv3/only_for_trackers.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert dependencies("train", tmp_path) == [
        "dsv3/training/inner/step.py",
        "dsv3/training/loop.py",
        "dsv3/training/sibling.py",
        "stages/train.py",
    ]


def test_a_view_of_train_counts_for_a_stage_that_computes_it():
    assert is_view("dsv3/sizing/memory.py", "train")
    assert "dsv3/sizing/memory.py" in dependencies("estimate_size")


@pytest.mark.parametrize("name", [*VIEWS, *TRAIN_VIEWS])
def test_every_view_exists(name: str):
    assert (ROOT / name).exists()
    assert (ROOT / name).is_dir() == name.endswith("/")


COMPUTING = ("mini_model/", "dsv3/data/", "dsv3/fp8/", "dsv3/kernels/")
WIRING = {"background", "checkpoint", "fp8_hooks", "hooks", "loop", "plan", "session", "setup"}


def test_nothing_that_computes_a_weight_takes_anything_from_a_view():
    # A constant that moves into a view would change the weights, and nothing would re-run.
    from dsv3.dependencies import imported_files

    taken = {
        name: views
        for name in TRAIN
        if name.startswith(COMPUTING) or (name.startswith("dsv3/training/") and Path(name).stem not in WIRING)
        if (views := sorted(file for file in imported_files(name, ROOT) if is_view(file, "train")))
    }
    assert taken == {}, "move what is shared to a file that counts, or take that file out of the views"


def test_the_text_of_a_tree_is_ascii_and_one_line():
    assert canonical([1, "é", None]) == "[1,'\\xe9',None]"

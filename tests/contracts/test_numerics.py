"""The tolerances that docs/numerics.md names are those of the tests."""

import ast
import re

import pytest

from tests.contracts.import_closure import ROOT
from tests.contracts.test_tree import TEXTS

ROWS = re.findall(r"^\| `(tests/\S+)` \| `(\w+)` \| `([^`]+)` \|", TEXTS["docs/numerics.md"], flags=re.MULTILINE)


def source(path: str, name: str) -> str:
    """The text of the one function, or assignment, of that name in a file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    found = []
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
        if name in names | {getattr(node, "name", "")}:
            decorators = [ast.get_source_segment(text, each) or "" for each in getattr(node, "decorator_list", [])]
            found.append("\n".join([*decorators, ast.get_source_segment(text, node) or ""]))
    assert len(found) == 1, f"{path}: {len(found)} definitions of {name}"
    return found[0]


def test_the_table_of_tolerances_was_found():
    section = TEXTS["docs/numerics.md"].split("## Tolerances")[1]
    assert len(ROWS) == section.count("\n| `tests/") >= 10


@pytest.mark.parametrize(("path", "name", "tolerance"), ROWS)
def test_a_tolerance_is_the_one_that_stands_in_the_test(path, name, tolerance):
    assert re.search(rf"(?<![\w.]){re.escape(tolerance)}(?![\w.])", source(path, name))

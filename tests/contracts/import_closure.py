"""Which files a stage executes: the closure of its local imports, read from the source without running it.

Imports inside functions count: they run too. The walk stops at `dsv3/params/read.py`: it validates the whole file and
so imports every section's class, but it alters no value (no class has a default): a change there can refuse a run, and
never change a result. A stage that is shaped by a section imports that section's module itself.

Run `python -m tests.contracts.import_closure` to bring every stage's code dependencies in dvc.yaml up to date.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("stages", "dsv3", "mini_model")
BOUNDARY = "dsv3/params/read.py"


def module_file(name: str) -> Path | None:
    """Return the source file of a local module, or None for a package (empty by contract) or a foreign module."""
    if name.split(".")[0] not in PACKAGES:
        return None
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return path if path.is_file() else None


def imported_files(path: Path) -> Iterator[Path]:
    """Yield the local files that `path` imports, at its top or within a function."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            names = [str(base), *(f"{base}.{alias.name}" for alias in node.names)]
        yield from filter(None, map(module_file, names))


def import_closure(path: Path) -> set[str]:
    """Return the files that `path` executes, itself included, relative to the root; see the module's essay."""
    seen: set[Path] = set()
    pending = [path]
    while pending:
        current = pending.pop()
        if current in seen or current == ROOT / BOUNDARY:
            continue
        seen.add(current)
        pending += imported_files(current)
    return {file.relative_to(ROOT).as_posix() for file in seen}


def refreshed(pipeline: str) -> str:
    """Return the text of dvc.yaml with each stage's Python dependencies replaced by its import closure."""

    def refresh(match: re.Match[str]) -> str:
        others = [line for line in match["deps"].splitlines(keepends=True) if not line.endswith(".py\n")]
        code = [f"      - {name}\n" for name in sorted(import_closure(ROOT / f"stages/{match['stage']}.py"))]
        return "".join([match["head"], *code, *others])

    stage = r"(?P<head>^  (?P<stage>[a-z_]+):\n(?:    .*\n)*?    deps:\n)(?P<deps>(?:      - .*\n)+)"
    return re.sub(stage, refresh, pipeline, flags=re.MULTILINE)


if __name__ == "__main__":
    file = ROOT / "dvc.yaml"
    file.write_text(refreshed(file.read_text(encoding="utf-8")), encoding="utf-8")

"""Which code a stage's results depend on: the one answer to "what re-runs?".

A stage depends on the files that it executes: the closure of its local imports, read from the source without running
it. Imports inside functions count: they run too. Left out are the *views*, files that may be edited without making a
result wrong; each stands in a table below with the reason. The walk stops at a view: what only a view imports is part
of it. A new file counts until it is named there.

Two readers ask here. dvc.yaml lists the files as `deps`, and DVC compares their bytes. The fingerprint of a checkpoint
holds a digest of each file's syntax, so that a comment, a docstring or another line break costs no training.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("stages", "dsv3", "mini_model")

VIEWS = {
    "dsv3/cli.py": "reads options and prints mistakes; a change can refuse a command, never alter a number",
    "dsv3/dependencies.py": "only lists files; a change of the list shows in dvc.yaml",
    "dsv3/params/read.py": "checks all of params.yaml and alters no value (no parameter has a default)",
    "dsv3/progress.py": "what a terminal shows",
    "dsv3/params/runtime.py": "what differs between machines and changes no result",
    "dsv3/tracking/": "takes numbers and returns none; trackers can be rebuilt (`dsv3.tracking.rebuild`), and tables "
    "keep the layout in which they were written until the next run",
}
"""Views of every stage: a file, or a folder with all that is in it -> what makes it one."""

TRAIN_VIEWS = {
    "dsv3/export/model_card.py": "the words around the facts in the export's README; old words stay until the next "
    "training",
    "dsv3/sizing/activations.py": "part of the memory estimate, which is printed and shown in trackers",
    "dsv3/sizing/flops.py": "estimates the cost; of the results, one column (model_flops_per_s) keeps the old estimate",
    "dsv3/sizing/machines.py": "part of the table of what fits where",
    "dsv3/sizing/memory.py": "the memory estimate, which is printed and shown in trackers",
    "dsv3/sizing/parameters.py": "counts parameters for what is printed and shown in trackers",
    "dsv3/sizing/report.py": "collects the estimates",
    "dsv3/sizing/sharded.py": "estimates memory; chooses how processes share a training, which changes no result",
    "dsv3/training/fingerprint.py": "names checkpoints; another definition gives other names by itself",
    "dsv3/training/heartbeat.py": "when a process gives the others up; the training goes on to the same weights",
    "dsv3/training/interruption.py": "when a training stops; it goes on to the same weights",
    "dsv3/training/launch.py": "starts processes; their number is `runtime`'s and changes at most the rounding",
    "dsv3/training/leftovers.py": "removes what other trainings have left",
    "dsv3/training/lock.py": "who may write checkpoints, not what is in them",
}
"""Further views of `train`. The sizing is a file each, so that what a training really shares with it counts."""

SKIPPED_FIELDS = ("ctx", "kind", "type_comment")
"""What follows from the place in the tree (Load, Store), or is a way of writing (u"")."""


def is_view(name: str, stage: str) -> bool:
    """Return whether the file `name`, relative to the root, is a view of `stage`."""
    views = [*VIEWS, *(TRAIN_VIEWS if stage == "train" else ())]
    return any(name == view or (view.endswith("/") and name.startswith(view)) for view in views)


def dependencies(stage: str, root: Path = ROOT) -> list[str]:
    """Return the files of code that shape the results of `stage`, relative to `root`, sorted."""
    seen: set[str] = set()
    pending = [f"stages/{stage}.py"]
    while pending:
        name = pending.pop()
        if name not in seen and not is_view(name, stage):
            seen.add(name)
            pending += imported_files(name, root)
    return sorted(seen)


def imported_files(name: str, root: Path) -> Iterator[str]:
    """Yield the local files that the file `name` imports, at its top or within a function."""
    package = Path(name).parent.parts
    for node in ast.walk(ast.parse((root / name).read_text(encoding="utf-8"))):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *filter(None, [node.module])])
            modules = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        yield from filter(None, (module_file(module, root) for module in modules))


def module_file(module: str, root: Path) -> str | None:
    """Return the file of a local module, or None for a package (empty by contract) or a foreign module."""
    parts = module.split(".")
    name = f"{'/'.join(parts)}.py"
    return name if parts[0] in PACKAGES and (root / name).is_file() else None


def syntax_digests(names: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """Return the digest of each file's syntax by name."""
    return {name: syntax_digest((root / name).read_text(encoding="utf-8")) for name in names}


def syntax_digest(source: str) -> str:
    """Return a digest of what Python code says: the same for other comments, docstrings and formatting.

    It is the same on every version of Python that can parse the code.
    """
    return hashlib.sha256(canonical(ast.parse(source)).encode("ascii")).hexdigest()[:16]


def canonical(value: Any) -> str:
    """Return a syntax tree as text, without positions, docstrings (of attributes, too) and fields that say nothing.

    `ast.dump` differs between versions of Python, which add fields that are empty in older code.
    """
    if isinstance(value, list):
        kept = (item for item in value if not (isinstance(item, ast.Expr) and is_text(item.value)))
        return f"[{','.join(map(canonical, kept))}]"
    if not isinstance(value, ast.AST):
        return ascii(value)
    fields = {name: getattr(value, name, None) for name in sorted(value._fields) if name not in SKIPPED_FIELDS}
    if isinstance(value, ast.JoinedStr):
        fields["values"] = merged_texts(value.values)
    stated = {name: canonical(field) for name, field in fields.items() if field is not None}
    return f"{type(value).__name__}({','.join(f'{name}={text}' for name, text in stated.items() if text != '[]')})"


def merged_texts(pieces: list[ast.expr]) -> list[ast.expr]:
    """Return the pieces of an f-string with neighbouring texts as one: how many there are depends on the version."""
    merged: list[ast.expr] = []
    for is_written, group in groupby(pieces, key=is_text):
        nodes = list(group)
        text = "".join(getattr(node, "value", "") for node in nodes) if is_written else ""
        merged += ([ast.Constant(text)] if text else []) if is_written else nodes
    return merged


def is_text(node: ast.AST) -> bool:
    """Return whether a node is a text that is written out."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)

"""The picture of the packages in docs/architecture.md, and what it leaves out, from the imports of the code.

`python -m tests.contracts.package_graph` writes both again; a test compares.
"""

import re
from itertools import product

import grimp

from tests.contracts.import_closure import ROOT

PAGE = ROOT / "docs/architecture.md"
BLOCK = re.compile(r"(?<=```mermaid\n)flowchart TD\n.*?(?=```)", flags=re.DOTALL)
LEFT_OUT = re.compile(r"(?<=left out, and so are\n).*?(?=, which everyone may import)", flags=re.DOTALL)
EVERYWHERE = {"dsv3.errors", "dsv3.artifacts", "dsv3.cli", "dsv3.markdown", "dsv3.progress", "dsv3.dependencies"}
"""Imported by nearly every package: their arrows would hide the others."""


def arrows() -> list[tuple[str, str]]:
    """Return the imports between packages that no longer path of imports implies, sorted."""
    graph = grimp.build_graph("stages", "dsv3", "mini_model", cache_dir=None)
    packages = {"stages", "mini_model", *graph.find_children("dsv3")} - EVERYWHERE
    importing = {
        (one, other)
        for one, other in product(packages, packages)
        if one != other and graph.find_shortest_chains(one, other, as_packages=True)
    }
    direct = {(one, other) for one, other in importing if is_direct(graph, one, other)}
    implied = {
        (one, other)
        for one, other in direct
        for middle in packages
        if (one, middle) in importing and (middle, other) in importing
    }
    return sorted(direct - implied)


def is_direct(graph: grimp.ImportGraph, one: str, other: str) -> bool:
    """Return whether a module of `one` imports a module of `other`."""
    importers = {one, *graph.find_descendants(one)}
    imported = {other, *graph.find_descendants(other)}
    return any(imported & graph.find_modules_directly_imported_by(module) for module in importers)


def picture() -> str:
    """Return the graph as Mermaid writes it."""
    lines = [f"    {one} --> {other}" for one, other in arrows()]
    return "\n".join(["flowchart TD", *lines, ""]).replace("dsv3.", "")


def names_left_out() -> str:
    """Return the modules that the picture leaves out as the page lists them."""
    *names, last = (f"`{name.removeprefix('dsv3.')}`" for name in sorted(EVERYWHERE))
    return f"{', '.join(names)} and {last}"


def refreshed(page: str) -> str:
    """Return the page with the picture, and the list of what it leaves out, as they are now."""
    return LEFT_OUT.sub(names_left_out(), BLOCK.sub(picture(), page, count=1), count=1)


if __name__ == "__main__":
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

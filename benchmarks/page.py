"""Write docs/benchmarks.md from what the benchmarks found.

    python -m benchmarks.page

Each file of docs/benchmarks is one benchmark's `--json`, and makes a section; nothing of the page is typed.
`make bench` runs the benchmarks of `SECTIONS`, then this.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.results import markdown
from dsv3.artifacts import read_json, write_text
from dsv3.cli import command

ROOT = Path(__file__).parent.parent
FOLDER, PAGE = ROOT / "docs/benchmarks", ROOT / "docs/benchmarks.md"
SECTIONS = ("train_step", "time_to_loss", "quality", "generate", "startup", "tokenize", "growth")
HEAD = """# Benchmarks

Written by `make bench` from [docs/benchmarks](benchmarks), a file per benchmark: nothing here is typed. Peers run in
the same process or in turn with ours; ratios are medians of ratios round by round, so that they hold where the
machine's speed drifts; single times do not. A load average above the number of cores says that other programs ran
beside.
"""


def step_tables(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of `benchmarks.train_step`, which has a form of its own, in that of the others."""
    names = list(dict.fromkeys(name for row in values["steps"].values() for name in row))
    rows = [[name, *(row.get(key) for key in names)] for name, row in values["steps"].items()]
    table = {"title": "One optimizer step, medians", "columns": ["", *(n.replace("_", " ") for n in names)]}
    return {
        "question": "How long does one training step take?",
        "conditions": values["conditions"],
        "setting": {**values["setting"], "config": Path(values["setting"]["config"]).name},
        "tables": [{**table, "rows": rows, "remarks": []}],
    }


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page of the benchmarks' results, by their names."""
    tables = {name: step_tables(values) if "steps" in values else values for name, values in found.items()}
    return "\n".join([HEAD, *(markdown(tables[name], name) for name in SECTIONS if name in tables)])


def results(folder: Path) -> dict[str, Any]:
    """Return what the files in `folder` hold, by the benchmarks' names."""
    return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}


def main(
    folder: Annotated[Path, typer.Option(help="Folder of the benchmarks' files.")] = FOLDER,
    output: Annotated[Path, typer.Option(help="The page.")] = PAGE,
) -> None:
    """Write the page."""
    write_text(output, page(results(folder)))


if __name__ == "__main__":
    command(main)

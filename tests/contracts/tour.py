"""The page docs/tour.md, from what a clone printed in which README's first experiment was run at full length.

`python -m tests.contracts.tour CLONE --conditions "two cores of …"` reads such a clone, checked out at its baseline
(`git checkout -f main && dvc checkout`), writes what it holds into docs/tour.json, takes the picture where there is a
Chromium, and writes the page. Without CLONE it writes the page from docs/tour.json alone. The page is made by the code
that a user runs (the report, the comparison, the addresses of views), so a test that makes it again sees where it lies.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3.comparison import Run, comparison, read_runs
from dsv3.report import results_rows, stage_outputs, table
from dsv3.tracking.views import BOOKMARKS, HOST, address_lines
from tests.browser.pages import browser, interface
from tests.contracts.import_closure import ROOT

PAGE, RECORD, PICTURE = ROOT / "docs/tour.md", ROOT / "docs/tour.json", ROOT / "docs/figures/tour.png"
EXPERIMENT = "fp8"
PORT = 43800
TEMPLATE = """# A tour: what does FP8 cost?

README's first experiment at full length, in a fresh clone: commit `{commit}`,
{conditions}.
This page is written by `python -m tests.contracts.tour` from what that clone held.

## The answer

{markdown}

{answer}

## 1 · Clone, and run the pipeline

```bash
git clone <address> dsv3-lab && cd dsv3-lab
make repro
```

It installs what is pinned, runs every stage, and ends with:

```text
{report}
```

## 2 · Ask the question

```bash
source .venv/bin/activate
git commit -am "my baseline"
dvc exp run -n {experiment} -S train.use_fp8=true
```

Download, tokenize and estimate_size do not depend on the parameter. Train, evaluate and sample ran again.

## 3 · Look

```bash
make ui
```

```text
{views}
```

The first of them:

![Loss by precision in Aim](figures/tour.png)

Each precision has a color: the two curves lie on each other. The table has each run's held-out loss, validation loss
and speed.

## 4 · Compare

```bash
python -m dsv3.report compare HEAD {experiment}
```

```text
{comparison}
```
"""


def page(record: Mapping[str, Any]) -> str:
    """Return the page of a record."""
    runs = [Run(**run) for run in record["runs"]]
    return TEMPLATE.format(
        commit=record["commit"],
        conditions=record["conditions"],
        experiment=EXPERIMENT,
        answer=answer(*runs),
        markdown=comparison(runs, markdown=True),
        report="Results\n" + table([(name, value) for name, value in record["report"]]),
        views="\n".join(address_lines(f"http://{HOST}:{PORT}")),
        comparison=comparison(runs, markdown=False),
    )


def answer(baseline: Run, experiment: Run) -> str:
    """Return what the experiment changed, in two sentences."""
    loss, minutes = (experiment.numbers[name] - baseline.numbers[name] for name in ("heldout", "minutes"))
    share = loss / baseline.numbers["heldout"]
    size, than = f"{abs(loss):.4f} nats/char ({100 * abs(share):.2f} %)", "higher" if loss > 0 else "lower"
    return (
        f"With FP8, which a CPU has to emulate, the held-out loss is {size} {than}, and the training took "
        f"{minutes:.1f} minutes more.\nThat is one seed, and seeds differ by about as much; [numerics.md](numerics.md) "
        "has six with a weight decay of 0.1, and there the loss is the same."
    )


def read_clone(clone: Path, conditions: str) -> dict[str, Any]:
    """Return the record of a clone."""
    with contextlib.chdir(clone):
        runs = read_runs(["HEAD", EXPERIMENT])
        report = results_rows(stage_outputs(Path("dvc.yaml")))
        commit = json.loads(Path("results/train/run.json").read_text())["dvc"]["git_sha"]
    different = [name for name in runs[0].params if runs[0].params[name] != runs[1].params.get(name)]
    kept = [Run(run.name, {name: run.params[name] for name in different}, run.numbers) for run in runs]
    return {"commit": commit[:7], "conditions": conditions, "runs": [vars(run) for run in kept], "report": report}


def take_picture(clone: Path) -> None:
    """Save what Chromium shows of the first view of the clone's Aim."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with interface(clone, environment, PORT) as address, browser(address, PICTURE.parent) as pages:
        pages.wait_until_indexed(2)
        pages.open(BOOKMARKS[0].path)
        pages.wait(lambda: len(pages.attributes(".LineChart path.Line", "1")) == 4, "curves")
        pages.save(PICTURE.stem)


def main(
    clone: Annotated[Path | None, typer.Argument(help="A clone in which the experiment was run.")] = None,
    conditions: Annotated[str, typer.Option(help="Where it ran, and beside what.")] = "",
) -> None:
    """Write docs/tour.md."""
    if clone:
        record = read_clone(clone, conditions)
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        take_picture(clone)
    PAGE.write_text(page(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

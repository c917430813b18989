"""Train the model and export it.

With runtime.num_processes > 1 this process checks everything, then starts that many of itself and waits for them.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dsv3.cli import DryRunOption, ParamsOption, stage
from dsv3.progress import ProgressMode, ProgressOption, QuietOption


def main(
    tokens: Annotated[Path, typer.Option(help="Folder of the token shards.")],
    corpus: Annotated[Path, typer.Option(help="Folder of the corpus, for its manifest.")],
    sizes: Annotated[
        Path, typer.Option(help="A file of estimate_size, which writes none for a training that it refuses.")
    ],
    model: Annotated[Path, typer.Option(help="Folder for the exported model.")],
    results: Annotated[Path, typer.Option(help="Folder for metrics, tables and run.json.")],
    params: ParamsOption = Path("params.yaml"),
    dry_run: DryRunOption = False,
    progress: ProgressOption = ProgressMode.auto,
    quiet: QuietOption = False,
) -> None:
    """Train the model and export it."""
    from dsv3.params.read import read_params

    parameters = read_params(params)

    from dsv3.training.initial_weights import check_not_replaced
    from dsv3.training.launch import check_environment, is_worker, run_workers
    from dsv3.training.plan import (
        check_folders,
        check_output,
        check_tokens,
        introduction,
        read_manifest,
        read_training_plan,
    )

    check_environment(parameters.runtime)
    check_not_replaced(parameters.train, model)
    plan = read_training_plan(parameters, tokens)
    check_output(sizes, "estimate_size")
    manifest = read_manifest(corpus)
    check_folders(model, results, tokens)
    if not is_worker():
        print(introduction(plan))
    starts_workers = parameters.runtime.num_processes > 1 and not is_worker()
    if dry_run or (not starts_workers and os.environ.get("LOCAL_RANK", "0") == "0"):
        print(check_tokens(tokens))  # once on each machine
    if starts_workers and not dry_run:
        run_workers(parameters.runtime.num_processes, "stages.train", sys.argv[1:])
    if starts_workers or dry_run:
        return

    from dsv3.training.session import Outputs, run_training

    run_training(plan, Outputs(tokens, model, results, manifest), ProgressMode.none if quiet else progress)


if __name__ == "__main__":
    stage(main)

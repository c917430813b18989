"""Score the exported model on the whole held-out text.

The model is loaded from its folder by this checkout's class (`dsv3.export.loading`); no code from the folder is run.
This stage knows nothing of `dsv3.training`.
"""

from pathlib import Path
from typing import Annotated

import typer

from dsv3.cli import DryRunOption, ParamsOption, stage
from dsv3.progress import ProgressMode, ProgressOption, QuietOption, counted, shown_progress


def main(
    model: Annotated[Path, typer.Option(help="Folder of the exported model.")],
    tokens: Annotated[Path, typer.Option(help="Folder of the token shards.")],
    run: Annotated[Path, typer.Option(help="The training's run.json.")],
    output: Annotated[Path, typer.Option(help="Folder for metrics, tables and figures.")],
    params: ParamsOption = Path("params.yaml"),
    dry_run: DryRunOption = False,
    progress: ProgressOption = ProgressMode.auto,
    quiet: QuietOption = False,
) -> None:
    """Score the exported model on the whole validation and test text."""
    from dsv3.params.read import read_params

    parameters = read_params(params)
    settings = parameters.evaluate

    from dsv3.artifacts import check_not_mixed
    from dsv3.data.meta import check_shards, open_stream, read_meta
    from dsv3.devices import device_name, torch_device
    from dsv3.evaluation.files import FILES, summary, write_evaluation
    from dsv3.evaluation.sliding_window import SPLITS, check_fits, evaluate
    from dsv3.export.loading import check_model, load_model
    from dsv3.tracking.recorder import add_to_run, read_record
    from dsv3.tracking.results import evaluate_events

    check_not_mixed(output, FILES)
    check_model(model, tokens)
    record = read_record(run)
    described = read_meta(tokens)
    streams = {split: open_stream(tokens, described, split) for split in SPLITS}
    meta = described.model_dump()
    num_tokens = sum(len(stream) - 1 for stream in streams.values())
    device = torch_device(parameters.runtime)
    print(
        f"{model}: {num_tokens:,} tokens of {' and '.join(SPLITS)} on {device_name(device)}, "
        f"windows of {settings.block_size} moved by {settings.stride}"
    )
    print(check_shards(tokens, described, SPLITS))
    if dry_run:
        return

    loaded = load_model(model, device)
    check_fits(loaded, meta, settings)
    with shown_progress(ProgressMode.none if quiet else progress, "evaluate", num_tokens, "token") as shown:
        evaluation = evaluate(loaded, streams, meta, settings, counted(shown))
    write_evaluation(evaluation, output)
    add_to_run(run, parameters, evaluate_events(output / "metrics.json", record["step"]))
    print(summary(evaluation))


if __name__ == "__main__":
    stage(main)

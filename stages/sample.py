"""Generate text with the exported model, for reading and for the trackers."""

from pathlib import Path
from typing import Annotated

import typer

from dsv3.cli import DryRunOption, ParamsOption, stage
from dsv3.progress import ProgressMode, ProgressOption, QuietOption, counted, shown_progress


def main(
    model: Annotated[Path, typer.Option(help="Folder of the exported model.")],
    run: Annotated[Path, typer.Option(help="The training's run.json.")],
    output: Annotated[Path, typer.Option(help="The Markdown file to write.")],
    params: ParamsOption = Path("params.yaml"),
    dry_run: DryRunOption = False,
    progress: ProgressOption = ProgressMode.auto,
    quiet: QuietOption = False,
) -> None:
    """Continue the prompts of params.yaml with the exported model."""
    from dsv3.params.read import read_params

    parameters = read_params(params)
    settings = parameters.sample
    import time

    from dsv3.artifacts import check_replaceable_file, write_text
    from dsv3.devices import device_name, torch_device
    from dsv3.export.loading import check_model, load_model, load_tokenizer
    from dsv3.generation.sampling import BEGINNING, check_fits, markdown, sample_all, total_drafts
    from dsv3.tracking.recorder import add_to_run, read_record
    from dsv3.tracking.results import sample_events

    check_replaceable_file(output, BEGINNING, "page of samples")
    check_model(model)
    record = read_record(run)
    device = torch_device(parameters.runtime)
    print(
        f"{model}: {len(settings.prompts)} prompts, {settings.num_return_sequences} continuations each, "
        f"at most {settings.max_new_tokens} tokens, on {device_name(device)}"
    )
    if dry_run:
        return

    loaded, tokenizer = load_model(model, device), load_tokenizer(model)
    check_fits(loaded, tokenizer, settings)
    start = time.perf_counter()
    with shown_progress(ProgressMode.none if quiet else progress, "sample", len(settings.prompts), "prompt") as shown:
        samples = sample_all(loaded, tokenizer, settings, parameters.seed, counted(shown))
    seconds = time.perf_counter() - start
    write_text(output, markdown(samples, settings, parameters.seed, record))

    add_to_run(run, parameters, sample_events(output, record["step"]))
    drafts = total_drafts(samples)
    new_tokens = sum(item.num_new_tokens for item in samples)
    print(f"{output}: {new_tokens:,} tokens, {new_tokens / seconds:.0f} tokens/s{f'; {drafts}' if drafts else ''}")


if __name__ == "__main__":
    stage(main)

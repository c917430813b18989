"""Fetch the text and verify it."""

from pathlib import Path
from typing import Annotated

import typer

from dsv3.cli import DryRunOption, ParamsOption, stage


def main(
    output: Annotated[Path, typer.Option(help="Folder for the text and manifest.json.")],
    params: ParamsOption = Path("params.yaml"),
    dry_run: DryRunOption = False,
) -> None:
    """Fetch the text that section `data` of params.yaml names, verify it, and write it with a manifest."""
    from dsv3.data.sources import source_summary, write_corpus
    from dsv3.params.read import read_params

    parameters = read_params(params).data
    print(f"{'would write' if dry_run else 'writes'} {source_summary(parameters)} into {output}", flush=True)
    if dry_run:
        return
    measure, origin = write_corpus(parameters, output, note=print)
    print(f"{output / measure.file}: {origin.source}, {measure.characters:,} characters, {measure.bytes:,} bytes,")
    print(f"  {measure.num_documents:,} document(s), SHA-256 {measure.sha256}")


if __name__ == "__main__":
    stage(main)

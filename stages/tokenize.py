"""Train the tokenizer, split the text, write token shards."""

from pathlib import Path
from typing import Annotated

import typer

from dsv3.cli import DryRunOption, ParamsOption, stage
from dsv3.progress import ProgressMode, ProgressOption, QuietOption


def main(
    corpus: Annotated[Path, typer.Option(help="Folder that the download stage wrote.")],
    output: Annotated[Path, typer.Option(help="Folder for the token shards, the tokenizer and meta.json.")],
    metrics: Annotated[Path, typer.Option(help="JSON file for the numbers that describe them.")],
    params: ParamsOption = Path("params.yaml"),
    dry_run: DryRunOption = False,
    progress: ProgressOption = ProgressMode.auto,
    quiet: QuietOption = False,
) -> None:
    """Split the corpus into train, validation and test, and write each as shards of token ids."""
    from dsv3.artifacts import check_replaceable_file, write_json
    from dsv3.data.tokens import METRICS_BEGINNING, tokens_summary, write_tokens
    from dsv3.params.architecture import read_architecture
    from dsv3.params.read import read_params

    parameters = read_params(params)
    check_replaceable_file(metrics, METRICS_BEGINNING, "metrics.json of tokenize")
    if dry_run:
        print(f"would write {tokens_summary(corpus, parameters.tokenize)} into {output}")
        return
    vocabulary_limit = read_architecture(Path(parameters.model.config)).vocab_size
    mode = ProgressMode.none if quiet else progress
    values = write_tokens(corpus, output, parameters.tokenize, vocabulary_limit, mode)
    write_json(metrics, values)

    used = values["vocabulary_used"]
    exactly = "exactly" if values["round_trip_exact"] else "NOT exactly"
    print(f"{output}: {values['vocab_size']:,} tokens in the vocabulary, {used:.1%} of them used in training")
    for split in ("train", "validation", "test"):
        print(f"  {split:10} {values[split]['tokens']:>15,} tokens {values[split]['characters']:>15,} characters")
    print(f"  {values['characters_per_token']:.3f} characters per token; decoded again {exactly}")


if __name__ == "__main__":
    stage(main)

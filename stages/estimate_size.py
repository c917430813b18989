"""Count parameters, memory and arithmetic before anything is trained."""

from pathlib import Path
from typing import Annotated

import typer

from dsv3.cli import DryRunOption, ParamsOption, stage

FILES = ("accepted.txt", "headline.json", "metrics.json", "table.json", "table.md")


def main(
    output: Annotated[Path, typer.Option(help="Folder for tables, metrics.json, headline.json and accepted.txt.")],
    configs: Annotated[Path, typer.Option(help="Folder whose config*.json make up the table.")] = Path("mini_model"),
    params: ParamsOption = Path("params.yaml"),
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Show what each of so many training processes would need, by sharding.")
    ] = None,
    dry_run: DryRunOption = False,
) -> None:
    """Count parameters, memory and arithmetic of the chosen model, and compare all of them in a table."""
    from dsv3.artifacts import check_not_mixed, write_json, write_text
    from dsv3.params.architecture import read_architecture
    from dsv3.params.read import read_params
    from dsv3.sizing.machines import has_nvidia_driver
    from dsv3.sizing.report import check_budget, markdown_table, metrics, process_table, table_row

    parameters = read_params(params)
    check_not_mixed(output, FILES)
    train, inference, chosen = parameters.train, parameters.estimate_size, Path(parameters.model.config)
    paths = sorted({*configs.glob("config*.json"), chosen})
    architecture = read_architecture(chosen)
    if dry_run:
        print(f"would estimate {chosen} in full and tabulate {', '.join(map(str, paths))} into {output}")
        return

    values = metrics(architecture, train, inference)
    rows = [table_row(path, read_architecture(path), train, inference) for path in paths]
    rows.sort(key=lambda row: row["parameters_total"])
    print(markdown_table(rows))
    print(f"{chosen}, trained as params.yaml says:")
    for name, value in values.items():
        print(f"  {name:40} {value:>25,}")

    if ranks is not None:
        print(f"\nGiB on each of {ranks} processes, estimated:\n", *process_table(architecture, train, ranks), sep="\n")

    # Refused here rather than by train: the pipeline stops before a weight is made.
    accepted = output / "accepted.txt"
    accepted.unlink(missing_ok=True)
    device = parameters.runtime.device_type(has_nvidia_driver())
    check_budget(architecture, train, device, inference.memory_budget_gib)
    write_text(output / "table.md", markdown_table(rows))
    write_json(output / "table.json", rows)
    write_json(output / "metrics.json", values)
    write_json(output / "headline.json", {"parameters": values["parameters_total"]})
    # What train depends on: the same words whatever the estimates are, so that none of them re-runs a training.
    write_text(accepted, "The training fits estimate_size.memory_budget_gib, where that sets a bound.\n")


if __name__ == "__main__":
    stage(main)

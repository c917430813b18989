"""The command that exports a model in another form: `python -m dsv3.export gguf MODEL OUTPUT.gguf | fp8 MODEL OUTPUT`.

MODEL is the folder that the train stage wrote, `outputs/final_model`. It is not changed.
"""

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dsv3.cli import run_app

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Write an exported model in another form.",
)
ModelArgument = Annotated[Path, typer.Argument(help="The exported model, as in outputs/final_model.")]


class Dtype(StrEnum):
    """How the matrices of a GGUF file are stored."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"


@app.command("gguf")
def write_gguf(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="The file to write.")],
    dtype: Annotated[Dtype, typer.Option(help="Of matrices; vectors and routers are always f32.")] = Dtype.f32,
) -> None:
    """Write one GGUF file, for llama.cpp and programs built on it."""
    from dsv3.export.gguf.write import export_gguf  # torch is slow to import, and --help needs none

    logging.getLogger("gguf").setLevel(logging.WARNING)  # its INFO line names the temporary file
    typer.echo(export_gguf(model, output, dtype.value))


@app.command("fp8")
def write_fp8(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    power_of_two_scales: Annotated[
        bool,
        typer.Option(
            "--power-of-two-scales",
            help="Scales as in V3.1 (ue8m0), the choice after train.fp8_power_of_two_scales; default: any fp32 number.",
        ),
    ] = False,
) -> None:
    """Write a folder with the matrices in block-scaled FP8, the form of DeepSeek's release."""
    from dsv3.export.fp8 import export_fp8

    export_fp8(model, output, power_of_two_scales)
    scale = "power of two (ue8m0)" if power_of_two_scales else "scale"
    typer.echo(f"{output}: matrices in e4m3, one {scale} per block of 128x128")


if __name__ == "__main__":
    run_app(app)

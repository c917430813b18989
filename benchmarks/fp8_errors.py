"""What block-scaled FP8 costs one matrix product, and what the choices within it are worth.

Each of a linear layer's three products is a sum over an inner dimension: forward sums over inputs, dgrad over outputs,
wgrad over tokens. Its operands are rounded as each choice says and multiplied in float64, so the error is that of the
rounding alone. Then the other error, of adding: Hopper's tensor cores add FP8 products with about 14 bits (report,
section 3.3.2), which is emulated by cutting the running sum to 14 bits after every 32 products.

    python -m benchmarks.fp8_errors                              print the tables; the pipeline must have run once
    python -m benchmarks.fp8_errors --page docs/numerics.md      write them into the page

The error of a product is the norm of the difference as a share of the norm of the product, after every row and every
column was divided by the norm of its vector: a small channel counts as much as a large one.

Letters: R rows, W columns, I inputs, O outputs.
"""

import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.fp8_operands import Layer, captured_layers, normal_layer
from benchmarks.studies.pages import replace_section
from benchmarks.studies.report import table
from dsv3.artifacts import read_json
from dsv3.cli import ParamsOption, command
from dsv3.fp8.definition import AMAX_FLOOR, BLOCK, MX_BLOCK
from dsv3.fp8.quantize import scale_and_inverse
from dsv3.fp8.rounding import bf16_values

PRODUCTS = ("forward", "dgrad", "wgrad")
WHOLE = 1 << 30
TENSOR, ROW = (WHOLE, WHOLE), (1, WHOLE)
TILE = (1, BLOCK)
SQUARE = (BLOCK, BLOCK)
WGMMA_INNER = 32
"""Products that one FP8 instruction of Hopper adds."""
HOPPER_BITS = 14
OUTLIERS = (1, 1_000, 100_000)
VERSION = torch.__version__


@dataclass(frozen=True)
class Choice:
    """How activations and gradients are rounded; weights are e4m3 in 128x128 blocks (but for MXFP8), same scales."""

    block: tuple[int, int] = TILE
    """Rows and columns of a block whose columns lie along the inner dimension."""
    dtype: torch.dtype = torch.float8_e4m3fn
    power_of_two_scales: bool = False
    is_mx: bool = False
    """MXFP8: weights, too, in blocks along the inner dimension of each product."""


CHOICES: dict[str, Choice | None] = {
    "1×128, e4m3 (this project)": Choice(),
    "1×128, e4m3, power-of-two scales": Choice(power_of_two_scales=True),
    "1×32, weights too, e4m3, power-of-two scales (MXFP8)": Choice((1, MX_BLOCK), power_of_two_scales=True, is_mx=True),
    "one scale per row, e4m3": Choice(ROW),
    "128×128, e4m3": Choice(SQUARE),
    "one scale per tensor, e4m3": Choice(TENSOR),
    "1×128, e5m2": Choice(dtype=torch.float8_e5m2),
    "bf16, no scales": None,
}


def rounded(x_RI: Tensor, choice: Choice) -> Tensor:
    """Return the fp32 values of `x_RI` in the choice's format; a last block may be smaller."""
    out = torch.empty_like(x_RI)
    height, width = choice.block
    bands = zip([x_RI], [out], strict=True) if height == 1 else zip(x_RI.split(height), out.split(height), strict=True)
    for band, into in bands:
        for part, target in zip(band.split(width, 1), into.split(width, 1), strict=True):
            target.copy_(_rounded_blocks(part, choice, (1,) if height == 1 else (0, 1)))
    return out


def _rounded_blocks(part: Tensor, choice: Choice, dims: tuple[int, ...]) -> Tensor:
    """Return `part` in the choice's format, with one scale over `dims`."""
    amax = part.abs().amax(dims, keepdim=True)
    # the project's own scales, made for e4m3, stretched to the other format's range by a power of two
    stretch = {torch.float8_e4m3fn: 1.0, torch.float8_e5m2: 128.0}[choice.dtype]
    scale, inverse = scale_and_inverse(amax, choice.power_of_two_scales)
    return (part * (inverse * stretch)).to(choice.dtype).float() * (scale / stretch)


def errors(layer: Layer, choice: Choice | None) -> dict[str, float]:
    """Return the error of each product; None means operands in bf16."""
    weight = Choice(SQUARE, power_of_two_scales=choice is not None and choice.power_of_two_scales)
    weight = choice if choice and choice.is_mx else weight

    def activation(x_RI: Tensor) -> Tensor:
        return rounded(x_RI, choice) if choice else bf16_values(x_RI)

    x, grad, w = layer.x_RI, layer.grad_RO, layer.weight_OI
    weight_OI = rounded(w, weight) if choice else bf16_values(w)
    dgrad_weight_OI = rounded(w.t(), weight).t() if choice and choice.is_mx else weight_OI
    return {
        "forward": product_error((activation(x), weight_OI.t()), (x, w.t())),
        "dgrad": product_error((activation(grad), dgrad_weight_OI), (grad, w)),
        "wgrad": product_error((activation(grad.t()), activation(x.t()).t()), (grad.t(), x)),
    }


def product_error(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    """Return the error of the product of `found`, as the module says it is measured."""
    first_RI, second_IW = (operand.double() for operand in exact)
    size_RW = first_RI.norm(dim=1)[:, None] * second_IW.norm(dim=0)[None, :]
    size_RW = size_RW.clamp_min(AMAX_FLOOR)
    truth_RW = first_RI @ second_IW
    difference_RW = found[0].double() @ found[1].double() - truth_RW
    return ((difference_RW / size_RW).norm() / (truth_RW / size_RW).norm()).item()


def error_table(cases: Mapping[str, Layer]) -> str:
    """Return the errors of every choice in percent, three columns per case."""
    header = ["activations and gradients", *(f"{product}, {case}" for case in cases for product in PRODUCTS)]
    rows = []
    for name, choice in CHOICES.items():
        found = [errors(layer, choice) for layer in cases.values()]
        rows.append([name, *(f"{100 * each[product]:.2f}" for each in found for product in PRODUCTS)])
    return table(header, rows)


def captured_table(layers: Mapping[str, Layer]) -> str:
    """Return per choice the layers' mean error of each product, the worst layer's, and what became zero, in percent."""
    kinds = [f"{product}, {kind}" for product in PRODUCTS for kind in ("mean", "worst layer")]
    rows = []
    for name, choice in CHOICES.items():
        found = [errors(layer, choice) for layer in layers.values()]
        by_product = [[each[product] for each in found] for product in PRODUCTS]
        cells = [f"{100 * value:.2f}" for values in by_product for value in (statistics.fmean(values), max(values))]
        zeros = statistics.fmean(zero_share(layer.grad_RO, choice) for layer in layers.values())
        rows.append([name, *cells, f"{100 * zeros:.3f}"])
    return table(["activations and gradients", *kinds, "gradients that became 0"], rows)


def zero_share(x_RI: Tensor, choice: Choice | None) -> float:
    """Return the share of the numbers that are not zero and become zero."""
    values = rounded(x_RI, choice) if choice else bf16_values(x_RI)
    return (((values == 0) & (x_RI != 0)).sum() / (x_RI != 0).sum().clamp_min(1)).item()


def cut(x: Tensor, bits: int) -> Tensor:
    """Return fp32 numbers cut to `bits` significant bits, towards zero."""
    return (x.view(torch.int32) & -(1 << (24 - bits))).view(torch.float32)


def accumulated(first_RI: Tensor, second_IW: Tensor, bits: int, promoted_every: int) -> Tensor:
    """Return the product as a sum that keeps `bits` bits, added to an fp32 sum after every `promoted_every` numbers."""
    total_RW = torch.zeros(len(first_RI), second_IW.shape[1])
    running_RW = torch.zeros_like(total_RW)
    for start in range(0, first_RI.shape[1], WGMMA_INNER):
        part = slice(start, start + WGMMA_INNER)
        running_RW = cut(running_RW + first_RI[:, part] @ second_IW[part], bits)
        if (start + WGMMA_INNER) % promoted_every == 0:
            total_RW, running_RW = total_RW + running_RW, torch.zeros_like(total_RW)
    return total_RW + running_RW


def accumulation_table(num_inner: int = 4096) -> str:
    """Return the errors of adding `num_inner` products of e4m3 numbers, for sums around zero and for growing sums."""
    generator = torch.Generator().manual_seed(0)
    normal = [torch.randn(128, num_inner, generator=generator).to(torch.float8_e4m3fn).float() for _ in range(2)]
    cases = {"around zero": normal, "one sign": [operand.abs() for operand in normal]}
    ways = {
        "fp32": (24, num_inner),
        f"{HOPPER_BITS} bits, to fp32 every {BLOCK} (the report's, this project's kernels)": (HOPPER_BITS, BLOCK),
        f"{HOPPER_BITS} bits, to fp32 every {8 * BLOCK}": (HOPPER_BITS, 8 * BLOCK),
        f"{HOPPER_BITS} bits throughout": (HOPPER_BITS, num_inner),
    }
    header = [
        f"sums of {num_inner:,} products",
        *(f"{kind}, {case}" for case in cases for kind in ("error", "largest")),
    ]
    rows = []
    for name, (bits, promoted_every) in ways.items():
        cells = []
        for first_RI, second_RI in cases.values():
            truth = first_RI.double() @ second_RI.double().t()
            difference = accumulated(first_RI, second_RI.t(), bits, promoted_every).double() - truth
            size = truth.square().mean().sqrt()
            cells += [difference.square().mean().sqrt() / size, difference.abs().max() / size]
        rows.append([name, *(f"{100 * cell.item():.5f}" for cell in cells)])
    return table(header, rows)


def main(
    params: ParamsOption = Path("params.yaml"),
    tokens: Annotated[Path, typer.Option(help="Token data, for the captured operands.")] = Path("data/tokens"),
    steps: Annotated[int, typer.Option(help="Training steps before the operands are captured.")] = 40,
    page: Annotated[Path | None, typer.Option(help="Write the tables into this page's marked sections.")] = None,
) -> None:
    """Measure the rounding and summation errors of FP8 products."""
    torch.manual_seed(0)
    captured = captured_layers(params, tokens, steps)
    made = {f"outliers ×{size:,}" if size > 1 else "normal": normal_layer(size) for size in OUTLIERS}
    text = read_json(tokens / "meta.json")["corpus"]["source"]
    note = f"{len(captured)} linear layers after {steps} steps on text `{text}`, {platform.machine()}, torch {VERSION}."
    tables = {
        "fp8 made": error_table(made),
        "fp8 captured": f"{captured_table(captured)}\n\n{note}",
        "fp8 sums": accumulation_table(),
    }
    for name, tabled in tables.items():
        if page is None:
            print(f"\n{name}, errors in percent\n\n{tabled}")
        else:
            replace_section(page, name, tabled)


if __name__ == "__main__":
    command(main)

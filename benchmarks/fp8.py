"""Block-scaled FP8: what the quantizers, the layers and a training step cost, on a CPU emulated, on a GPU natively.

On a CPU the emulation is compared with fp32: quantizers as a share of a plain copy's bandwidth, one linear layer, one
layer of experts, and a whole training step of nano with the parameters of params.yaml. The claim: a step of emulated
FP8 takes at most 1.2 times a step of fp32.

On a GPU the kernels are compared with ceilings measured in the same run (a copy, one bf16 and one FP8 product of equal
FLOPs by torch) and with whatever peers are installed (benchmarks/fp8_peers.py); those that are not say so.

Everything is timed in turn, in one process, and given as medians.

    python -m benchmarks.fp8                      the GPU where there is one, else the CPU
    python -m benchmarks.fp8 --device cpu --json fp8.json

Letters: R rows, E n_routed_experts, O outputs, I inputs.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.fp8_peers import GPU_SHAPES, Product, contestants, layers, unavailable
from benchmarks.moe import Layer, Shape
from benchmarks.timing import Functions, best_device, check_json, conditions, medians_s
from benchmarks.train_step import Setting, our_step
from dsv3.cli import command
from dsv3.devices import multiplies_fp8
from dsv3.fp8 import quantize
from dsv3.fp8.linear import LowPrecisionLinear
from dsv3.fp8.recipe import DEEPSEEK_RECIPE
from dsv3.fp8.rounding import BF16, fp8_rounding
from dsv3.kernels import emulated_linear
from dsv3.kernels.registry import register_experts
from dsv3.params.read import read_params

ROOT = Path(__file__).parent.parent
LINEARS = {"nano": (2048, 256, 512), "tiny": (2048, 768, 2048)}
"""Rows, inputs, outputs."""
EXPERTS = {"nano": Shape(8, 2, 256, 128, 2048), "tiny": Shape(8, 2, 768, 512, 2048)}
CPU_ROWS, GPU_ROWS = (4096, 1024), (16384, 7168)
"""Shape of what the quantizers take."""
Result = dict[str, Any]


def compared(functions: Functions, rounds: int, device: torch.device, base: str) -> Result:
    """Return the medians of `functions` in milliseconds, and their times as multiples of that of `base`."""
    found = medians_s(functions, rounds, device)
    return {
        "milliseconds": {name: round(seconds * 1e3, 3) for name, seconds in found.items()},
        f"times_{base}": {name: round(seconds / found[base], 3) for name, seconds in found.items()},
    }


def bandwidths(functions: dict[str, tuple[Callable[[], object], int]], rounds: int, device: torch.device) -> Result:
    """Return gigabytes per second of functions that move so many bytes, and their shares of that of `copy`."""
    found = medians_s({name: function for name, (function, _) in functions.items()}, rounds, device)
    speed = {name: num_bytes / found[name] / 1e9 for name, (_, num_bytes) in functions.items()}
    return {
        "gigabytes_per_s": {name: round(value, 1) for name, value in speed.items()},
        "share_of_copy": {name: round(value / speed["copy"], 3) for name, value in speed.items()},
    }


def cpu_quantizers(rounds: int) -> Result:
    """Return the bandwidth of the emulation's quantizers, which read and write fp32."""
    x, device = torch.randn(CPU_ROWS), torch.device("cpu")
    target = torch.empty_like(x)
    functions: dict[str, tuple[Callable[[], object], int]] = {"copy": (lambda: target.copy_(x), 2 * x.nbytes)}
    for name in ("rows", "columns", "weight"):
        function = getattr(quantize, f"rounded_{name}")
        functions[name] = (lambda function=function: function(x), 2 * x.nbytes)
    return bandwidths(functions, rounds, device)


def gpu_quantizers(rounds: int, device: torch.device) -> Result:
    """Return the bandwidth of the kernels: rows and columns of bf16, weights of fp32, which are written twice."""
    from dsv3.kernels import triton_launch as launch

    x_RI = torch.randn(GPU_ROWS, device=device).bfloat16()
    target_RI, w_EOI = torch.empty_like(x_RI), torch.randn(8, 2048, GPU_ROWS[1], device=device)
    end_E = torch.tensor([len(x_RI) // 2, len(x_RI)], dtype=torch.int32, device=device)
    tiles = launch.schedule(end_E, len(x_RI))
    index_R = torch.randperm(len(x_RI), device=device)
    rows_bytes, scales = x_RI.nbytes + x_RI.numel(), 4 / 128
    functions: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: target_RI.copy_(x_RI), 2 * x_RI.nbytes),
        "rows": (lambda: launch.quantize_rows(x_RI, False), rows_bytes + int(scales * x_RI.numel())),
        "columns": (lambda: launch.quantize_columns(x_RI, tiles, None, False), rows_bytes),
        "columns, gathered": (lambda: launch.quantize_columns(x_RI, tiles, index_R, False), rows_bytes),
        "weights": (lambda: launch.quantize_weight(w_EOI, False), w_EOI.nbytes + 2 * w_EOI.numel()),
    }
    return bandwidths(functions, rounds, device)


def linear_step(linear: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    """Return a function that runs one layer forward and backward; its weight is rounded or quantized in every pass."""
    leaves = [x, *linear.parameters()]

    def run() -> None:
        torch.autograd.grad(linear(x), leaves, grad)

    return run


def cpu_linear(sizes: tuple[int, int, int], rounds: int) -> Result:
    """Return the times of one linear layer, forward and backward, in fp32 and emulated."""
    num_rows, num_inputs, num_outputs = sizes
    x, grad = torch.randn(num_rows, num_inputs, requires_grad=True), torch.randn(num_rows, num_outputs)
    linear = nn.Linear(num_inputs, num_outputs, bias=False)
    functions = {"fp32": linear_step(linear, x, grad)}
    for to in (BF16, fp8_rounding(DEEPSEEK_RECIPE)):
        functions[f"{to.name}_emulated"] = linear_step(LowPrecisionLinear(linear, emulated_linear.product(to)), x, grad)
    return compared(functions, rounds, torch.device("cpu"), "fp32")


def cpu_experts(shape: Shape, rounds: int) -> Result:
    """Return the times of one layer of experts, forward and backward, in fp32 and emulated."""
    device = torch.device("cpu")
    layer = Layer(shape, device, torch.float32)

    def step(name: str, dtype: torch.dtype, use_fp8: bool) -> Callable[[], object]:
        return layer.step(register_experts(name, device, dtype, use_fp8))

    functions = {
        "fp32": step("cpu", torch.float32, False),
        "bf16_emulated": step("bf16_emulated", torch.bfloat16, False),
        "fp8_emulated": step("fp8_emulated", torch.float32, True),
    }
    return compared(functions, rounds, device, "fp32")


def nano_step(precision: str) -> Callable[[], object]:
    """Return a function that does one optimizer step of nano, as params.yaml trains it, in fp32 or an emulation."""
    train = read_params(ROOT / "params.yaml").train
    is_fp8 = precision == "fp8_emulated"
    setting = Setting(
        config=ROOT / "mini_model/config_nano.json",
        batch=train.per_device_train_batch_size,
        block=train.block_size,
        precision="fp32" if is_fp8 else precision,
        checkpointing=False,
        bf16_moments=False,
        device=torch.device("cpu"),
    )
    return our_step(setting, train.optim, DEEPSEEK_RECIPE if is_fp8 else None)


def cpu_results(rounds: int) -> dict[str, Result]:
    """Return everything that is measured on a CPU, by name."""
    device, precisions = torch.device("cpu"), ("fp32", "bf16_emulated", "fp8_emulated")
    results = {"quantizers": cpu_quantizers(rounds)}
    results |= {f"linear layer, {name}": cpu_linear(sizes, rounds) for name, sizes in LINEARS.items()}
    results |= {f"experts, {name}": cpu_experts(shape, rounds) for name, shape in EXPERTS.items()}
    steps = {precision: nano_step(precision) for precision in precisions}
    return results | {"training step of nano": compared(steps, rounds, device, "fp32")}


def gpu_product(product: Product, rounds: int, device: torch.device) -> Result:
    """Return the speed of forward, dgrad and wgrad of one shape, with ceilings and peers."""
    found = medians_s(contestants(product, device), rounds, device)
    speed = {name: product.flops / seconds / 1e12 for name, seconds in found.items()}
    return {
        "tflop_per_s": {name: round(value, 1) for name, value in speed.items()},
        "share_of_bf16": {name: round(value / speed["ceiling: bf16 mm"], 3) for name, value in speed.items()},
    }


def gpu_results(rounds: int, device: torch.device) -> dict[str, Result]:
    """Return everything that is measured on a GPU, by name."""
    results = {"quantizers": gpu_quantizers(rounds, device)} if multiplies_fp8(device) else {}
    results |= {str(product): gpu_product(product, rounds, device) for product in GPU_SHAPES}
    for sizes in ((16384, 4096, 2048), (16384, 7168, 18432)):
        results[f"linear layer, forward + backward, {sizes}"] = compared(layers(sizes, device), rounds, device, "bf16")
    return results


def table(name: str, result: Result) -> str:
    """Return one result as text."""
    columns = list(result)
    lines = [f"\n{name}", f"{'':40}" + "".join(f"{column:>18}" for column in columns)]
    lines += [f"{row:40}" + "".join(f"{result[column][row]:18}" for column in columns) for row in result[columns[0]]]
    return "\n".join(lines)


def main(
    rounds: Annotated[int, typer.Option(help="Times that each contestant runs.")] = 15,
    threads: Annotated[int, typer.Option(help="Threads of the CPU.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Time quantizers, layers and steps in FP8."""
    check_json(output)
    torch.set_num_threads(threads)
    target = best_device(device)
    about = conditions(target)
    print(json.dumps(about))
    results = gpu_results(rounds, target) if target.type == "cuda" else cpu_results(rounds)
    for name, result in results.items():
        print(table(name, result))
    for peer, reason in unavailable.items():
        print(f"\nnot measured: {peer}: {reason}")
    if output is not None:
        written = {"conditions": about, "results": results, "not_measured": unavailable}
        output.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command(main)

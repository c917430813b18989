"""What the Triton kernels are held to, on whatever device they run: the interpreter's CPU here, a GPU in tests/gpu.

The witness is the emulation of `dsv3.fp8.quantize`, always on the CPU, and for single blocks the definition's scalars.
Import only where kernels can run: Triton decides on import whether it interprets.

Letters: A assignments, R rows, I inputs.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dsv3.fp8 import definition, quantize
from dsv3.fp8.definition import BLOCK
from dsv3.fp8.linear import Product
from dsv3.fp8.recipe import DEEPSEEK_RECIPE, Recipe
from dsv3.fp8.rounding import fp8_rounding
from dsv3.kernels import cpu, dense_gemm, emulated_linear, triton_experts, triton_launch, triton_linear
from tests.dsv3.kernels.cases import Case, errors, results

SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 2.0**-100, 2.0**-101, 1e4, -1e4, 3.4e38, 448.0, 464.0, 1.0, math.inf, -math.inf]
HOSTILE = st.one_of(st.floats(width=32, allow_nan=True, allow_infinity=True), st.sampled_from(SPECIAL))


@dataclass(frozen=True)
class Groups:
    """Sizes of a grouped GEMM."""

    rows: tuple[int, ...]
    """Of each expert."""
    num_tokens: int
    """From which the rows are gathered."""
    num_inputs: int
    num_outputs: int

    @property
    def ends(self) -> list[int]:
        return list(accumulate(self.rows))

    @property
    def slices(self) -> list[slice]:
        return [slice(start, stop) for start, stop in pairwise([0, *self.ends])]


SMALL = Groups(rows=(130, 0, 1, 27), num_tokens=60, num_inputs=256, num_outputs=128)
"""Two tiles, the second not full; no row; one row; several blocks in every direction but one."""
MANY = Groups(rows=(1,) * 12, num_tokens=8, num_inputs=256, num_outputs=256)
"""More tiles than are taken together, the last few of them not as many; several blocks of outputs."""


def hostile(num_rows: int, num_columns: int) -> Tensor:
    """Return zeros, denormals, outliers of 1e4 and 1e-30, a NaN and both infinities among normal numbers."""
    x = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(0))
    x[:, ::37] *= 1e4
    x[2::7] *= 1e-30
    x[3::11] *= 1e-39
    x[:1, :128] = 0
    x[1, 130], x[4, 5], x[5, 6] = float("nan"), float("inf"), -float("inf")
    return x


def differing(x: Tensor, y: Tensor) -> int:
    """Return how many numbers differ; any two NaNs are equal, and so are the two zeros."""
    x, y = x.float().cpu(), y.float().cpu()
    assert x.shape == y.shape
    return int((~((x == y) | (x.isnan() & y.isnan()))).sum())


def quantizer_differences(device: torch.device) -> dict[str, int]:
    """Return for each quantizer the number of values and scales that differ from torch's."""
    found = {}
    for name, power_of_two_scales in (("fp32", False), ("power_of_two_scales", True)):
        x = hostile(75, 256)
        for dtype in (torch.float32, torch.bfloat16):
            pair = (
                triton_launch.quantize_rows(x.to(device, dtype), power_of_two_scales),
                quantize.quantized_rows(x.to(dtype), power_of_two_scales),
            )
            found[f"rows {name} {dtype}"] = sum(map(differing, *pair))
        weights = torch.stack([hostile(256, 384)[:, :256], torch.randn(256, 256) * 1e-3])
        stored = triton_launch.quantize_weight(weights.to(device), power_of_two_scales)
        for expert, weight in enumerate(weights):
            truth = quantize.quantized_weight(weight, power_of_two_scales)
            forward, transposed = ([part[expert] for part in stack] for stack in stored)
            found[f"weight {expert} {name}"] = sum(map(differing, forward, truth))
            found[f"transposed weight {expert} {name}"] = sum(map(differing, transposed, (t.t() for t in truth)))
        found[f"columns {name}"] = column_differences(x, SMALL, power_of_two_scales, device)
    return found


def column_differences(x_RI: Tensor, groups: Groups, power_of_two_scales: bool, device: torch.device) -> int:
    """Return the differences in columns of gathered rows, expert by expert."""
    index_A = torch.randint(0, len(x_RI), (sum(groups.rows),), generator=torch.Generator().manual_seed(1))
    tiles = triton_launch.schedule(torch.tensor(groups.ends, dtype=torch.int32, device=device), len(index_A))
    stored = triton_launch.quantize_columns(x_RI.to(device), tiles, index_A.to(device), power_of_two_scales)
    found, tile = 0, 0
    for rows in groups.slices:
        num_tiles = (rows.stop - rows.start + BLOCK - 1) // BLOCK
        if num_tiles:
            truth = quantize.quantized_columns(x_RI[index_A[rows]], power_of_two_scales)
            found += differing(stored.values[:, tile * BLOCK : (tile + num_tiles) * BLOCK], truth.values)
            found += differing(stored.scales[tile : tile + num_tiles].t(), truth.scales)
        tile += num_tiles
    return found


def check_hostile_blocks(device: torch.device, max_examples: int) -> int:
    """Assert that all three quantizers store a block as the definition says; return for how many blocks that was seen.

    A block repeats a few hostile numbers. The same numbers, turned by one from row to row, are 128 rows of one scale
    each, 32 columns likewise, and one block of a weight.
    """
    num_blocks = 0

    @settings(max_examples=max_examples, derandomize=True, deadline=None, database=None)
    @given(st.lists(HOSTILE, min_size=1, max_size=9), st.booleans())
    def check(values: list[float], power_of_two_scales: bool) -> None:
        nonlocal num_blocks
        num_blocks += 1
        block = (values * BLOCK)[:BLOCK]
        stored, scale = (
            torch.tensor(x, dtype=torch.float32) for x in definition.quantized_block(block, power_of_two_scales)
        )
        turned = turns(torch.tensor(block, dtype=torch.float32)).to(device)
        rows = triton_launch.quantize_rows(turned[:1], power_of_two_scales)
        end = torch.full((1,), BLOCK, dtype=torch.int32, device=device)
        columns = triton_launch.quantize_columns(
            turned[:, :32].contiguous(), triton_launch.schedule(end, BLOCK), None, power_of_two_scales
        )
        weight = triton_launch.quantize_weight(turned[None], power_of_two_scales)
        truth = turns(stored)
        seen = {
            "rows": differing(rows.values, truth[:1]),
            "columns": differing(columns.values[:, :BLOCK], truth[:, :32].t()),
            "weight": differing(weight.forward.values[0], truth),
            "transposed weight": differing(weight.transposed.values[0], truth.t()),
            "scales": sum(
                differing(s.reshape(-1), scale.expand(s.numel()))
                for s in (rows.scales, columns.scales[:1], weight.forward.scales, weight.transposed.scales)
            ),
            "emulation": sum(map(differing, quantize.quantized_rows(turned[:1].cpu(), power_of_two_scales), rows)),
        }
        assert not any(seen.values()), seen

    check()
    return num_blocks


def turns(block: Tensor) -> Tensor:
    """Return a square whose row r is the block turned by r."""
    at = torch.arange(len(block))
    return block[(at[:, None] + at[None, :]) % len(block)]


def gemm_errors(groups: Groups, device: torch.device, outlier: float = 1e3) -> dict[str, float]:
    """Return the relative error of each GEMM against float64 products of the operands as quantized by torch."""
    num_rows, generator = sum(groups.rows), torch.Generator().manual_seed(0)
    x = torch.randn(groups.num_tokens, groups.num_inputs, generator=generator)
    x[:, 7] *= outlier
    # Rows past the last one, which no kernel may look at.
    grad = torch.randn(num_rows + BLOCK, groups.num_outputs, generator=generator)
    weight = torch.randn(len(groups.rows), groups.num_outputs, groups.num_inputs, generator=generator) * 0.02
    index = torch.randint(0, groups.num_tokens, (num_rows,), generator=generator)
    tiles = triton_launch.schedule(torch.tensor(groups.ends, dtype=torch.int32, device=device), num_rows)
    on_device = x.to(device), grad.to(device)[:num_rows], index.to(device)
    found = products(*on_device, triton_launch.quantize_weight(weight.to(device), False), tiles)
    grad = grad[:num_rows]
    w, forward_rows, dgrad_rows = (
        rounded.to(device).double()
        for rounded in (quantize.rounded_weight(weight), quantize.rounded_rows(x), quantize.rounded_rows(grad))
    )
    experts = list(enumerate(groups.slices))
    truth = {
        "forward": torch.cat([forward_rows[on_device[2][rows]] @ w[expert].t() for expert, rows in experts]),
        "dgrad": torch.cat([dgrad_rows[rows] @ w[expert] for expert, rows in experts]),
        "wgrad": torch.stack([wgrad_truth(grad[rows], x[index[rows]], device) for rows in groups.slices]),
    }
    empty = [expert for expert, num_rows in enumerate(groups.rows) if num_rows == 0]
    return {**errors(found, truth), "wgrad of empty experts": float(found["wgrad"][empty].abs().sum())}


def products(
    x: Tensor, grad: Tensor, index: Tensor, weight: triton_launch.QuantizedWeight, tiles: triton_launch.Schedule
) -> dict[str, Tensor]:
    """Return what the kernels give for the three products."""
    rows = triton_launch.quantize_rows(x, False), triton_launch.quantize_rows(grad, False)
    columns = [triton_launch.quantize_columns(*side, False) for side in ((grad, tiles, None), (x, tiles, index))]
    return {
        "forward": triton_launch.grouped_gemm(rows[0], index, weight.forward, tiles, len(index), torch.float32),
        "dgrad": triton_launch.grouped_gemm(rows[1], None, weight.transposed, tiles, len(index), torch.float32),
        "wgrad": triton_launch.grouped_wgrad(*columns, tiles, torch.float32),
    }


def wgrad_truth(grad: Tensor, x: Tensor, device: torch.device) -> Tensor:
    """Return one expert's weight gradient in float64 from rounded operands."""
    grad, x = (quantize.rounded_columns(side).to(device).double() for side in (grad, x))
    return grad.t() @ x


def expert_errors(inputs: Case, recipe: Recipe, device: torch.device) -> dict[str, float]:
    """Return the relative difference of output and gradients between Triton and emulation."""
    found = results(partial(triton_experts.experts, recipe=recipe), inputs.on(device))
    truth = results(partial(cpu.experts, rounding=fp8_rounding(recipe)), inputs)
    return errors({name: value.cpu() for name, value in found.items()}, truth)


def cache_differences(inputs: Case) -> dict[str, int]:
    """Return the numbers that differ in what is kept in FP8, and in the gradients, from those of torch's quantizer."""
    tensors = inputs.hidden, inputs.index, inputs.weight, inputs.gate_up, inputs.down
    operands = triton_experts.weight_operands([inputs.gate_up, inputs.down], DEEPSEEK_RECIPE)
    gate_up = triton_experts._forward(*tensors, operands, "fp8")[1]
    _, values, scales, assignment, end = triton_experts._forward(*tensors, operands, "fp8_swiglu_cache")
    truth = quantize.quantized_rows(gate_up)
    found = {
        "values": differing(values.view(torch.float8_e4m3fn), truth.values),
        "scales": differing(scales, truth.scales),
    }
    saved = inputs.grad, inputs.hidden, inputs.weight, operands
    cached, whole = (
        triton_experts._backward(*saved, *packed, assignment, end, "fp8_swiglu_cache")
        for packed in ((values, scales), (quantize.dequantized(truth, (1, 128)), scales[:0]))
    )
    names = ["hidden", "weight", "gate_up", "down"]
    return found | {name: differing(*pair) for name, *pair in zip(names, cached, whole, strict=True)}


def linear_errors(sizes: tuple[int, int, int], recipe: Recipe, device: torch.device) -> dict[str, float]:
    """Return the relative difference between Triton and emulation of a layer of (rows, inputs, outputs)."""
    num_rows, num_inputs, num_outputs = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (num_rows, num_inputs), "weight": (num_outputs, num_inputs), "grad": (num_rows, num_outputs)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def run(product: Product, device: torch.device) -> dict[str, Tensor]:
        x, weight = (tensors[name].to(device, copy=True).requires_grad_() for name in ("x", "weight"))
        output = product.multiply(x, [weight], product.weight_operands([weight]))[0]
        output.backward(tensors["grad"].to(device))
        return {"output": output.detach().cpu(), "x": x.grad.cpu(), "weight": weight.grad.cpu()}

    emulated = run(emulated_linear.product(fp8_rounding(recipe)), torch.device("cpu"))
    return errors(run(triton_linear.product(recipe), device), emulated)


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, kind_a: object, scale_b: Tensor, kind_b: object, output_dtype: torch.dtype
) -> Tensor:
    """Return what torch says that `F.scaled_mm` returns for blocks of these kinds: the product of what they stand for.

    `scale_a` is (R, I / 128); `scale_b` is (O, I / 128) for 1 x 128 blocks, (I / 128, padded to a multiple of four,
    O / 128) for 128 x 128.
    """
    assert kind_a == F.ScalingType.BlockWise1x128
    rows = a.float() * scale_a.repeat_interleave(BLOCK, 1)
    if kind_b == F.ScalingType.BlockWise1x128:
        scale_IO = scale_b.t().repeat_interleave(BLOCK, 0)
    else:
        assert kind_b == F.ScalingType.BlockWise128x128
        scale_IO = scale_b[: a.shape[1] // BLOCK].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return (rows @ (b.float() * scale_IO)).to(output_dtype)


def dense_errors(device: torch.device, num_inputs: int = 640) -> dict[str, float]:
    """Return the relative difference of cuBLAS's products from ours."""
    generator = torch.Generator().manual_seed(0)
    x, grad, weight = (
        (torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)).to(device)
        for rows, columns in ((256, num_inputs), (256, 384), (384, num_inputs))
    )
    quantized, tiles = triton_launch.quantize_weight(weight[None], False), triton_linear.whole_schedule(256, device)
    both = {}
    for name, rows, operand in (("forward", x, quantized.forward), ("dgrad", grad, quantized.transposed)):
        quantized_rows = triton_launch.quantize_rows(rows, False)
        ours = triton_launch.grouped_gemm(quantized_rows, None, operand, tiles, 256, torch.float32)
        both[name] = dense_gemm.cublas_gemm(quantized_rows, operand), ours
    columns = [triton_launch.quantize_columns(rows, tiles, None, False) for rows in (grad, x)]
    ours = triton_launch.grouped_wgrad(columns[0], columns[1], tiles, torch.float32)[0]
    both["wgrad"] = dense_gemm.cublas_wgrad(columns[0], columns[1], 256), ours
    return {name: ((their.float() - our).norm() / our.norm()).item() for name, (their, our) in both.items()}

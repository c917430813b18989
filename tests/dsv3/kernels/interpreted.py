"""Runs the Triton kernels in Triton's interpreter and prints their distance from the emulation as JSON.

A process of its own, because Triton reads TRITON_INTERPRET when its own library is imported. Each kernel program
costs 10 to 30 ms here, so shapes are small; they still have several blocks in every direction.
"""

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import interpreter_patch

interpreter_patch.install()

import torch  # noqa: E402 (the patch comes first)

from dsv3.fp8 import quantize  # noqa: E402
from dsv3.fp8.linear import rounded_product  # noqa: E402
from dsv3.fp8.recipe import Recipe  # noqa: E402
from dsv3.fp8.rounding import fp8_rounding  # noqa: E402
from dsv3.kernels import cpu, triton_experts, triton_fp8, triton_launch, triton_linear  # noqa: E402
from tests.dsv3.kernels.cases import Case, case, errors, results  # noqa: E402

RECIPES = {"fp32 scales": Recipe(), "power-of-two scales": Recipe(has_power_of_two_scales=True)}
MUTATIONS = {
    "weight scale of the first block": ("tl.load(b_scale_at + block)", "tl.load(b_scale_at)"),
    "activation scale of the first block": ("tl.load(a_scale_at + block,", "tl.load(a_scale_at,"),
    "last block of the inner dimension dropped": ("range(0, k_blocks)", "range(0, k_blocks - 1)"),
    "last tile of wgrad dropped": ("range(first, last)", "range(first, last - 1)"),
    "last rows of a tile not masked in wgrad": ("mask=is_row[:, None], other=0.0).to(tl.float32)\n    scale, inverse"
        " = _scale_and_inverse(tl.max(_magnitude_bits(x), 0)", "mask=row[:, None] >= 0, other=0.0).to(tl.float32)\n"
        "    scale, inverse = _scale_and_inverse(tl.max(_magnitude_bits(x), 0)"),
    "first expert's weights for all": ("b_ptr + expert.to(tl.int64) * N * K", "b_ptr"),
    "gather forgotten": ("source = tl.load(index_ptr + row, mask=is_row, other=0)", "source = row"),
    "weight not transposed": ("tl.trans(q))", "q)"),
    "scale of another format": ("tl.constexpr(448.0)", "tl.constexpr(240.0)"),
    "NaN lost by the largest magnitude": ("tl.max(_magnitude_bits(x), 1), POW2)",
        "tl.max(tl.minimum(_magnitude_bits(x), 0x7F7FFFFF), 1), POW2)"),
}  # fmt: skip


def hostile(num_rows: int, num_columns: int) -> torch.Tensor:
    """Return zeros, denormals, outliers of 1e4 and 1e-30, a NaN and both infinities among normal numbers."""
    x = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(0))
    x[:, ::37] *= 1e4
    x[2::7] *= 1e-30
    x[3::11] *= 1e-39
    x[:1, :128] = 0
    x[1, 130], x[4, 5], x[5, 6] = float("nan"), float("inf"), -float("inf")
    return x


def differing_bits(x: torch.Tensor, y: torch.Tensor) -> int:
    """Return how many numbers differ; any two NaNs are equal."""
    x, y = x.float(), y.float()
    return int((~((x == y) | (x.isnan() & y.isnan()))).sum())


def quantiser_differences() -> dict[str, int]:
    """Return for each quantiser the number of values and scales that differ from torch's."""
    found = {}
    for name, pow2 in (("fp32", False), ("pow2", True)):
        x = hostile(75, 256)
        for dtype in (torch.float32, torch.bfloat16):
            pair = triton_launch.quantise_rows(x.to(dtype), pow2), quantize.quantised_rows(x.to(dtype), pow2)
            found[f"rows {name} {dtype}"] = sum(map(differing_bits, *pair))
        weights = torch.stack([hostile(256, 384)[:, :256], torch.randn(256, 256) * 1e-3])
        stored = triton_launch.quantise_weight(weights, pow2)
        for expert, weight in enumerate(weights):
            truth = quantize.quantised_weight(weight, pow2)
            forward, transposed = ([part[expert] for part in stack] for stack in stored)
            found[f"weight {expert} {name}"] = sum(map(differing_bits, forward, truth))
            found[f"transposed weight {expert} {name}"] = sum(map(differing_bits, transposed, (t.t() for t in truth)))
        found[f"columns {name}"] = column_differences(x, pow2)
    return found


def column_differences(x: torch.Tensor, pow2: bool) -> int:
    """Return the differences in columns of gathered rows: an expert with 130 rows, none, one, and 27."""
    end = torch.tensor([130, 130, 131, 158], dtype=torch.int32)
    index = torch.randint(0, len(x), (158,), generator=torch.Generator().manual_seed(1))
    tiles = triton_launch.schedule(end, 158)
    stored = triton_launch.quantise_columns(x, tiles, index, pow2)
    found = 0
    first_tiles, starts = [0, 2, 2, 3], [0, 130, 130, 131]
    for tile, start, stop in zip(first_tiles, starts, end.tolist(), strict=True):
        if start == stop:
            continue
        truth = quantize.quantised_columns(x[index[start:stop]], pow2)
        num_tiles = truth.scales.shape[1]
        found += differing_bits(stored.values[:, tile * 128 : (tile + num_tiles) * 128], truth.values)
        found += differing_bits(stored.scales[tile : tile + num_tiles].t(), truth.scales)
    return found


def expert_errors(inputs: Case, recipe: Recipe) -> dict[str, float]:
    """Return the relative difference of output and gradients between Triton and emulation."""
    triton = results(partial(triton_experts.experts, recipe=recipe), inputs)
    return errors(triton, results(partial(cpu.experts, rounding=fp8_rounding(recipe)), inputs))


def cache_differences(inputs: Case) -> dict[str, int]:
    """Return the numbers that differ in what waits in FP8, and in the gradients, from what torch's quantiser gives."""
    tensors = inputs.hidden, inputs.index, inputs.weight, inputs.gate_up, inputs.down
    gate_up = triton_experts._forward(*tensors, False, True, False)[1]
    _, values, scales, pair, end = triton_experts._forward(*tensors, False, True, True)
    truth = quantize.quantised_rows(gate_up)
    found = {
        "values": differing_bits(values.view(torch.float8_e4m3fn), truth.values),
        "scales": differing_bits(scales, truth.scales),
    }
    saved = inputs.grad, inputs.hidden, inputs.weight, inputs.gate_up, inputs.down
    cached, whole = (
        triton_experts._backward(*saved, *waiting, pair, end, False, True)
        for waiting in ((values, scales), (quantize.dequantised(truth, (1, 128)), scales[:0]))
    )
    names = ["hidden", "weight", "gate_up", "down"]
    return found | {name: differing_bits(*pair) for name, *pair in zip(names, cached, whole, strict=True)}


def check_operators() -> list[str]:
    """Check the operators' schemas, shapes of fake tensors and gradients under compilation; return what was checked."""
    inputs = case("one token", hidden_size=128, intermediate_size=128, num_experts=2)
    tensors = [inputs.hidden, inputs.index, inputs.weight, inputs.gate_up, inputs.down]
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in tensors]
    weight = torch.randn(200, 160, generator=torch.Generator().manual_seed(0)).requires_grad_()
    checks = {
        "experts": (torch.ops.dsv3.experts_triton, (*leaves, False, True, False)),
        "experts, SwiGLU in FP8": (torch.ops.dsv3.experts_triton, (*leaves, False, True, True)),
        "linear": (torch.ops.dsv3.linear_triton, (torch.randn(3, 160).requires_grad_(), weight, False, True)),
    }
    for operator, arguments in checks.values():
        torch.library.opcheck(operator, arguments)
    return list(checks)


def gemm_errors() -> dict[str, float]:
    """Return the relative error of each GEMM against float64 products of the operands as quantised by torch."""
    end = torch.tensor([130, 130, 131, 158], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(60, 256, generator=generator), torch.randn(158, 128, generator=generator)
    x[:, 7] *= 1e3
    weight = torch.randn(4, 128, 256, generator=generator) * 0.02
    index = torch.randint(0, 60, (158,), generator=generator)
    tiles, stored = triton_launch.schedule(end, 158), triton_launch.quantise_weight(weight, False)
    rows = triton_launch.quantise_rows(x, False), triton_launch.quantise_rows(grad, False)
    columns = [triton_launch.quantise_columns(*side, False) for side in ((grad, tiles, None), (x, tiles, index))]
    found = {
        "forward": triton_launch.grouped_gemm(rows[0], index, stored.forward, tiles, 158, torch.float32),
        "dgrad": triton_launch.grouped_gemm(rows[1], None, stored.transposed, tiles, 158, torch.float32),
        "wgrad": triton_launch.grouped_wgrad(*columns, tiles, torch.float32),
    }
    w = quantize.rounded_weight(weight).double()
    forward_rows, dgrad_rows = quantize.rounded_rows(x)[index].double(), quantize.rounded_rows(grad).double()
    slices = [slice(0, 130), slice(130, 130), slice(130, 131), slice(131, 158)]
    truth = {
        "forward": torch.cat([forward_rows[rows] @ w[expert].t() for expert, rows in enumerate(slices)]),
        "dgrad": torch.cat([dgrad_rows[rows] @ w[expert] for expert, rows in enumerate(slices)]),
        "wgrad": torch.stack([wgrad_truth(grad[rows], x[index[rows]]) for rows in slices]),
    }
    return {**errors(found, truth), "wgrad of the empty expert": float(found["wgrad"][1].abs().sum())}


def wgrad_truth(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return one expert's weight gradient in float64 from rounded operands."""
    return quantize.rounded_columns(grad).double().t() @ quantize.rounded_columns(x).double()


def linear_errors(num_rows: int, num_inputs: int, num_outputs: int, recipe: Recipe) -> dict[str, float]:
    """Return the same for a linear layer whose dimensions are no multiples of 128."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (num_rows, num_inputs), "weight": (num_outputs, num_inputs), "grad": (num_rows, num_outputs)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def run(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        x, weight = (tensors[name].clone().requires_grad_() for name in ("x", "weight"))
        output = product(x, weight)
        output.backward(tensors["grad"])
        return {"output": output.detach(), "x": x.grad, "weight": weight.grad}

    emulated = run(partial(rounded_product, rounding=fp8_rounding(recipe).name))
    return errors(run(partial(triton_linear.linear_product, recipe=recipe)), emulated)


def mutated(old: str, new: str, folder: Path) -> object:
    """Return the kernels with one piece of their source replaced."""
    source = Path(triton_fp8.__file__).read_text()
    assert source.count(old) >= 1, old
    path = folder / f"mutant_{len(list(folder.iterdir()))}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mutation_effects() -> dict[str, float]:
    """Return for each mutation the largest sign that something is wrong: differing numbers, or relative error."""
    effects = {}
    inputs = case("ragged", hidden_size=256, intermediate_size=128, num_experts=3)
    x, weight = hostile(12, 256), torch.randn(1, 256, 256)
    with tempfile.TemporaryDirectory() as folder:
        for name, replacement in MUTATIONS.items():
            triton_launch.kernels = mutated(*replacement, Path(folder))
            rows = map(differing_bits, triton_launch.quantise_rows(x, False), quantize.quantised_rows(x))
            truth = quantize.quantised_weight(weight[0]).values.t()
            transposed = differing_bits(triton_launch.quantise_weight(weight, False).transposed.values[0], truth)
            effects[name] = max(sum(rows), transposed, *expert_errors(inputs, Recipe()).values())
    triton_launch.kernels = triton_fp8
    return effects


def main() -> None:
    """Print everything as one line of JSON."""
    found: dict[str, dict] = {"quantisers": quantiser_differences(), "experts": {}}
    for routing in ("ragged", "empty experts", "one token", "no tokens"):
        inputs = case(routing, hidden_size=256, intermediate_size=128, num_experts=4)
        found["experts"][routing] = expert_errors(inputs, RECIPES["power-of-two scales"])
    many = case("one expert", hidden_size=128, intermediate_size=128, num_experts=4)
    repeats = {name: getattr(many, name).repeat(4, 1) for name in ("hidden", "index", "weight", "grad")}
    many = Case(gate_up=many.gate_up, down=many.down, **repeats)  # 148 rows per expert: two tiles, the second not full
    for name, recipe in RECIPES.items():
        found["experts"][f"two tiles, {name}"] = expert_errors(many, recipe)
    found["cache"] = cache_differences(many)
    found["gemms"] = gemm_errors()
    found["linear"] = linear_errors(130, 160, 200, Recipe())
    inputs, recipe = case("empty experts", 128, 128), Recipe(quantises_wgrad=False)
    found["bf16 wgrad"] = {"experts": expert_errors(inputs, recipe), "linear": linear_errors(130, 160, 200, recipe)}
    found["operators"] = check_operators()
    found["mutations"] = mutation_effects()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

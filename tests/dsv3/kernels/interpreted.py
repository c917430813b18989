"""Runs the Triton kernels in Triton's interpreter and prints their distance from the emulation as JSON.

A process of its own, because Triton reads TRITON_INTERPRET when its own library is imported. Each kernel program
costs 10 to 30 ms here, so shapes are small; they still have several blocks in every direction.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import interpreter_patch

interpreter_patch.install()

import torch  # noqa: E402 (the patch comes first)

from dsv3.fp8 import quantize  # noqa: E402
from dsv3.fp8.recipe import Recipe  # noqa: E402
from dsv3.kernels import dense_gemm, triton_fp8, triton_launch, triton_linear  # noqa: E402
from tests.dsv3.kernels import kernel_checks as checks  # noqa: E402
from tests.dsv3.kernels.cases import Case, case  # noqa: E402

CPU = torch.device("cpu")
RECIPES = {"fp32 scales": Recipe(), "power-of-two scales": Recipe(power_of_two_scales=True)}
ODD_LINEAR = (130, 160, 200)
"""Rows, inputs and outputs, none of them a multiple of 128."""
NOTICED = 1e-4
"""A relative error, a hundred times what another order of the sums makes."""
MUTATIONS = {
    "weight scale of the first block": ("tl.load(b_scale_at + block)", "tl.load(b_scale_at)"),
    "activation scale of the first block": ("tl.load(a_scale_at + block,", "tl.load(a_scale_at,"),
    "gradient's scale of the first tile in wgrad": ("g_scale_at += num_outputs", "g_scale_at += 0"),
    "input's scale of the first tile in wgrad": ("x_scale_at += num_inputs", "x_scale_at += 0"),
    "last block of the inner dimension dropped": ("range(0, num_input_blocks)", "range(0, num_input_blocks - 1)"),
    "last tile of wgrad dropped": ("range(first, last)", "range(first, last - 1)"),
    "last expert's tiles of rows dropped": ("if expert >= E:", "if expert >= E - 1:"),
    "last rows of a tile not masked in wgrad": ("mask=is_row[:, None], other=0.0).to(tl.float32)\n    scale, inverse"
        " = _scale_and_inverse(tl.max(_magnitude_bits(x), 0)", "mask=row[:, None] >= 0, other=0.0).to(tl.float32)\n"
        "    scale, inverse = _scale_and_inverse(tl.max(_magnitude_bits(x), 0)"),
    "first expert's weights for all": ("b_ptr + expert.to(tl.int64) * num_outputs * num_inputs", "b_ptr"),
    "gather forgotten": ("source = tl.load(index_ptr + row, mask=is_row, other=0)", "source = row"),
    "weight not transposed": ("outputs[None, :] * num_inputs + inputs[:, None]",
        "outputs[:, None] * num_inputs + inputs[None, :]"),
    "first tile of a group for all": ("first + within % size", "first + within * 0"),
    "first group of tiles for all": ("return first + within % size", "return within % size"),
    "scale of another format": ("tl.constexpr(448.0)", "tl.constexpr(240.0)"),
    "NaN lost by the largest magnitude": ("tl.max(_magnitude_bits(x), 1), POWER_OF_TWO_SCALES)",
        "tl.max(tl.minimum(_magnitude_bits(x), 0x7F7FFFFF), 1), POWER_OF_TWO_SCALES)"),
}  # fmt: skip


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
    """Return for each mutation the first clear sign that something is wrong: differing numbers, or relative error.

    Sizes of several groups of tiles take three times as long, and are taken where one group's tell nothing.
    """
    effects = {}
    x = checks.hostile(12, 256)
    with tempfile.TemporaryDirectory() as folder:
        for name, replacement in MUTATIONS.items():
            triton_launch.kernels = mutated(*replacement, Path(folder))
            rows = map(checks.differing, triton_launch.quantize_rows(x, False), quantize.quantized_rows(x))
            effects[name] = sum(rows)
            for sizes in (checks.SMALL, checks.MANY):
                if effects[name] < NOTICED:
                    effects[name] = max(effects[name], *checks.gemm_errors(sizes, CPU, outlier=3.0).values())
    triton_launch.kernels = triton_fp8
    return effects


MISREADINGS = {
    "as documented": lambda a, b, is_wgrad: (a, b),
    "rows' scales columns first": lambda a, b, is_wgrad: (a if is_wgrad else a.t().reshape(a.shape), b),
    "weight's scales transposed": lambda a, b, is_wgrad: (a, b if is_wgrad else b.t().reshape(b.shape)),
    "weight's scales forgotten": lambda a, b, is_wgrad: (a, b if is_wgrad else torch.full_like(b, 0.005)),
    "rows' scale of the first block": lambda a, b, is_wgrad: (a if is_wgrad else a[:, :1].expand_as(a), b),
    "gradient's scales tiles first in wgrad": lambda a, b, is_wgrad: (a.t().reshape(a.shape) if is_wgrad else a, b),
    "input's scale of the first tile in wgrad": lambda a, b, is_wgrad: (a, b[:, :1].expand_as(b) if is_wgrad else b),
}
"""How cuBLAS could read the scales that it is given, the right way first."""


def check_dense() -> dict[str, object]:
    """Return how far torch's dense product, as it is documented, lies from ours, and which misreadings are trusted."""
    found: dict[str, object] = {}
    for name, misread in MISREADINGS.items():

        def product(a, b, scale_a, kind_a, scale_b, kind_b, output_dtype, misread=misread):
            scale_a, scale_b = misread(scale_a, scale_b, kind_a == kind_b)
            return checks.scaled_mm(a, b, scale_a, kind_a, scale_b, kind_b, output_dtype)

        dense_gemm.F.scaled_mm = product
        dense_gemm.cublas_agrees.cache_clear()
        if name == "as documented":
            found["errors"] = checks.dense_errors(CPU)
        found[name] = dense_gemm.cublas_agrees(CPU)

    def refused(*arguments, **options):
        raise RuntimeError("only supported in CUDA for SM90")

    dense_gemm.F.scaled_mm = refused
    dense_gemm.cublas_agrees.cache_clear()
    found["refused"] = dense_gemm.cublas_agrees(CPU)
    return found


def check_operators() -> list[str]:
    """Check the operators' schemas, shapes of fake tensors and gradients under compilation; return what was checked."""
    inputs = case("one token", hidden_size=128, intermediate_size=128, num_experts=2)
    tensors = [inputs.hidden, inputs.index, inputs.weight, inputs.gate_up, inputs.down]
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in tensors]
    weight = torch.randn(200, 160, generator=torch.Generator().manual_seed(0)).requires_grad_()
    experts = triton_linear.weight_operands([inputs.gate_up, inputs.down], Recipe())
    linear = triton_linear.weight_operands([weight], Recipe())
    operators = {
        "weight": (torch.ops.dsv3.quantized_weight, (weight.detach(), False)),
        "experts": (torch.ops.dsv3.experts_triton, (*leaves, experts, "fp8")),
        "experts, SwiGLU in FP8": (torch.ops.dsv3.experts_triton, (*leaves, experts, "fp8_swiglu_cache")),
        "linear": (torch.ops.dsv3.linear_triton, (torch.randn(3, 160).requires_grad_(), [weight], linear, "fp8")),
    }
    for operator, arguments in operators.values():
        torch.library.opcheck(operator, arguments)
    return list(operators)


def main() -> None:
    """Print everything as one line of JSON."""
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with NaN, so that nobody finds old results
    found: dict[str, object] = {"quantizers": checks.quantizer_differences(CPU)}
    found["hostile blocks"] = checks.check_hostile_blocks(CPU, max_examples=40)
    experts = {}
    for routing in ("ragged", "empty experts", "one token", "no tokens"):
        inputs = case(routing, hidden_size=256, intermediate_size=128, num_experts=4)
        experts[routing] = checks.expert_errors(inputs, RECIPES["power-of-two scales"], CPU)
    many = case("one expert", hidden_size=128, intermediate_size=128, num_experts=4)
    repeats = {name: getattr(many, name).repeat(4, 1) for name in ("hidden", "index", "weight", "grad")}
    many = Case(gate_up=many.gate_up, down=many.down, **repeats)  # 148 rows per expert: two tiles, the second not full
    for name, recipe in RECIPES.items():
        experts[f"two tiles, {name}"] = checks.expert_errors(many, recipe, CPU)
    found["experts"] = experts
    found["gemms"] = checks.gemm_errors(checks.SMALL, CPU)
    found["many tiles"] = checks.gemm_errors(checks.MANY, CPU)
    found["cache"] = checks.cache_differences(many)
    found["linear"] = checks.linear_errors(ODD_LINEAR, Recipe(), CPU)
    inputs, recipe = case("empty experts", 128, 128), Recipe(wgrad_quant=False)
    found["bf16 wgrad"] = {
        "experts": checks.expert_errors(inputs, recipe, CPU),
        "linear": checks.linear_errors(ODD_LINEAR, recipe, CPU),
    }
    found["operators"] = check_operators()
    found["dense"] = check_dense()
    found["mutations"] = mutation_effects()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

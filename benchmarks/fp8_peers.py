"""The matrix products of FP8 layers on a GPU: this project's kernels, ceilings, and the peers that are installed.

A peer is tried once; one that isn't installed, or refuses the device or the shape, is left out and its reason kept in
`unavailable`. All take operands that are quantized already, except where the name says otherwise.

Letters: R rows, E n_routed_experts, O outputs, I inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dsv3.devices import multiplies_fp8
from dsv3.fp8.recipe import DEEPSEEK_RECIPE
from dsv3.kernels.convert import convert

Function = Callable[[], object]
unavailable: dict[str, str] = {}
"""Peer -> why it was not measured."""


@dataclass(frozen=True)
class Product:
    """One stack of weights and the rows that meet it, equally many for every expert."""

    name: str
    num_experts: int
    rows_per_expert: int
    num_outputs: int
    num_inputs: int

    @property
    def num_rows(self) -> int:
        """Rows of all experts."""
        return self.num_experts * self.rows_per_expert

    @property
    def flops(self) -> int:
        """Operations of one of the three products."""
        return 2 * self.num_rows * self.num_outputs * self.num_inputs

    def __str__(self) -> str:
        grouped = (
            f"{self.num_experts} x {self.rows_per_expert} rows" if self.num_experts > 1 else f"{self.num_rows} rows"
        )
        return f"{self.name}: {grouped}, {self.num_inputs} -> {self.num_outputs}"


GPU_SHAPES = [
    Product("config.json, q_b_proj", 1, 16384, 6144, 512),
    Product("config.json, o_proj", 1, 16384, 2048, 4096),
    Product("config.json, gate and up of the experts", 64, 1024, 1024, 2048),
    Product("config.json, down of the experts", 64, 1024, 2048, 512),
    Product("DeepSeek-V3, kv_b_proj", 1, 8192, 32768, 512),
    Product("DeepSeek-V3, o_proj", 1, 8192, 7168, 16384),
    Product("DeepSeek-V3, gate and up of 8 experts", 8, 4096, 4096, 7168),
    Product("DeepSeek-V3, down of 8 experts", 8, 4096, 7168, 2048),
]
"""What a training multiplies: 16384 tokens of config.json with 4 of 64 experts each; DeepSeek-V3 with experts spread
over 32 GPUs."""


class Operands:
    """Random operands of a product in bf16, and as this project quantizes them."""

    def __init__(self, product: Product, device: torch.device) -> None:
        from dsv3.kernels import triton_launch as launch

        generator = torch.Generator(device).manual_seed(0)
        self.launch, self.product = launch, product
        experts, num_rows = product.num_experts, product.num_rows
        self.x_RI = torch.randn(num_rows, product.num_inputs, device=device, generator=generator).bfloat16()
        self.grad_RO = torch.randn(num_rows, product.num_outputs, device=device, generator=generator).bfloat16()
        shape = experts, product.num_outputs, product.num_inputs
        weight = torch.randn(shape, device=device, generator=generator) * 0.02
        self.weight_EOI = weight.bfloat16()
        self.end_E = torch.arange(1, experts + 1, dtype=torch.int32, device=device) * product.rows_per_expert
        self.tiles = launch.schedule(self.end_E, num_rows)
        self.weight = launch.quantize_weight(weight, False)
        self.rows, self.grad_rows = launch.quantize_rows(self.x_RI, False), launch.quantize_rows(self.grad_RO, False)
        self.columns = [launch.quantize_columns(x, self.tiles, None, False) for x in (self.grad_RO, self.x_RI)]
        self.expert_R = torch.arange(experts, dtype=torch.int32, device=device).repeat_interleave(
            product.rows_per_expert
        )

    def own(self) -> dict[str, Function]:
        """Return this project's three products."""
        gemm, num_rows = self.launch.grouped_gemm, self.product.num_rows
        rest = self.tiles, num_rows, torch.bfloat16
        return {
            "ours: forward": partial(gemm, self.rows, None, self.weight.forward, *rest),
            "ours: dgrad": partial(gemm, self.grad_rows, None, self.weight.transposed, *rest),
            "ours: wgrad": partial(self.launch.grouped_wgrad, *self.columns, self.tiles, torch.float32),
        }


def contestants(product: Product, device: torch.device) -> dict[str, Function]:
    """Return everything that multiplies this product, by name."""
    w_OI = torch.randn(product.num_outputs, product.num_inputs, device=device).bfloat16()
    if not multiplies_fp8(device):
        x_RI = torch.randn(product.num_rows, product.num_inputs, device=device).bfloat16()
        return {"ceiling: bf16 mm": lambda: x_RI @ w_OI.t()}
    data = Operands(product, device)
    functions = {"ceiling: bf16 mm": lambda: data.x_RI @ w_OI.t(), **data.own()}
    peers: dict[str, Callable[[Operands], Function]] = {"ceiling: torch._scaled_mm, one scale": torch_tensorwise}
    if product.num_experts > 1:
        peers |= {"torch: F.grouped_mm, bf16": torch_grouped, "DeepGEMM: grouped": deep_gemm_grouped}
    else:
        peers |= {"torch: F.scaled_mm, 1x128": torch_blockwise, "DeepGEMM": deep_gemm_dense}
        peers |= {"transformers: with quantizer": transformers_dense}
    return functions | available({name: partial(peer, data) for name, peer in peers.items()})


def available(makers: Mapping[str, Callable[[], Function]]) -> dict[str, Function]:
    """Return those functions that can be made and run; note the others' reasons."""
    functions: dict[str, Function] = {}
    for name, make in makers.items():
        try:
            functions[name] = make()
            functions[name]()
            torch.cuda.synchronize()
        except Exception as error:  # a peer may fail in any way, and the others are still of interest
            functions.pop(name, None)
            lines = str(error).strip().splitlines() or [""]
            unavailable[name] = f"{type(error).__name__}: {lines[0]}"
    return functions


def torch_tensorwise(data: Operands) -> Function:
    """Return torch's FP8 product with one scale per tensor, of the shape of all rows and one expert: a ceiling."""
    one = torch.ones((), device=data.x_RI.device)
    a, b = data.rows.values, data.weight.forward.values[0].t()
    return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def torch_blockwise(data: Operands) -> Function:
    """Return torch's product of 1x128 and 128x128 blocks (cuBLAS), whose scales lie rows first, padded to four."""
    recipes: Any = F.ScalingType
    a, b = data.rows.values, data.weight.forward.values[0].t()
    scale_a = data.rows.scales.t().contiguous().t()
    scales = data.weight.forward.scales[0]
    scale_b = F.pad(scales, (0, -scales.shape[1] % 4))[:, : scales.shape[1]].t()
    kinds = recipes.BlockWise1x128, recipes.BlockWise128x128
    return lambda: F.scaled_mm(a, b, scale_a, kinds[0], scale_b, kinds[1], output_dtype=torch.bfloat16)


def torch_grouped(data: Operands) -> Function:
    """Return torch's grouped product in bf16."""
    weight = data.weight_EOI.transpose(1, 2)
    return lambda: F.grouped_mm(data.x_RI, weight, offs=data.end_E)


def deep_gemm_dense(data: Operands) -> Function:
    """Return DeepGEMM's product."""
    library = import_module("deep_gemm")
    weight = tuple(part[0] for part in data.weight.forward)
    out = torch.empty_like(data.grad_RO)
    return lambda: library.fp8_gemm_nt(tuple(data.rows), weight, out)


def deep_gemm_grouped(data: Operands) -> Function:
    """Return DeepGEMM's product of contiguous groups."""
    library = import_module("deep_gemm")
    out, operands = torch.empty_like(data.grad_RO), (tuple(data.rows), tuple(data.weight.forward))
    return lambda: library.m_grouped_fp8_gemm_nt_contiguous(*operands, out, data.expert_R)


def transformers_dense(data: Operands) -> Function:
    """Return the product of transformers' finegrained-fp8 kernel, which quantizes the rows itself."""
    linear = import_module("transformers.integrations.finegrained_fp8").finegrained_fp8_linear
    values, scales = (part[0] for part in data.weight.forward)
    return lambda: linear(data.x_RI, values, scales, [128, 128])


def layers(sizes: tuple[int, int, int], device: torch.device) -> dict[str, Function]:
    """Return a linear layer of (rows, inputs, outputs) forward and backward: bf16, ours, torchao's."""
    num_rows, num_inputs, num_outputs = sizes
    x = torch.randn(num_rows, num_inputs, device=device).bfloat16().requires_grad_()
    grad = torch.randn(num_rows, num_outputs, device=device).bfloat16()

    def step(change: Callable[[nn.Module], nn.Module]) -> Function:
        model = change(nn.Sequential(nn.Linear(num_inputs, num_outputs, bias=False, device=device)))

        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                output = model(x)
            torch.autograd.grad(output, [x, *model.parameters()], grad)

        return run

    def ours(model: nn.Module) -> nn.Module:
        convert(model, DEEPSEEK_RECIPE, device)
        return model

    def rowwise(model: nn.Module) -> nn.Module:
        torchao = import_module("torchao.float8")
        config = torchao.Float8LinearConfig.from_recipe_name("rowwise")
        changed: nn.Module = torchao.convert_to_float8_training(model.bfloat16(), config=config)
        changed.compile()
        return changed

    def blockwise(model: nn.Module) -> nn.Module:
        torchao = import_module("torchao.prototype.blockwise_fp8_training.linear")
        return nn.Sequential(torchao.Float8BlockwiseLinear.from_float(model[0].bfloat16()))  # pyright: ignore[reportIndexIssue]

    peers = {"torchao: rowwise, compiled": rowwise, "torchao: blockwise": blockwise}
    functions = {"bf16": step(lambda model: model), "ours": step(ours)}
    return functions | available({name: partial(step, change) for name, change in peers.items()})

"""One layer of experts, forward and backward: this project's backends beside transformers' and a padded bmm.

All are timed in one process, interleaved, and given as medians. The bound is what the layer's matrix products alone
take when the same library multiplies them back to back, with equal loads: no routing, no activation, nothing
allocated.

    python -m benchmarks.moe                      the shapes and peers of the README, fp32 on a CPU, bf16 on a GPU
    python -m benchmarks.moe --shape 8,2,256,128,4096 --json moe.json

Weights are rounded or quantized in every pass, as in the first one after an optimizer step.

Letters: T tokens, K num_experts_per_tok, A assignments, E n_routed_experts, D hidden_size, F intermediate_size,
R rows.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from benchmarks.timing import Functions, best_device, check_json, conditions, medians_s
from dsv3.cli import command
from dsv3.devices import multiplies_fp8
from dsv3.kernels.permute import expert_order
from dsv3.kernels.registry import register_experts

SHAPES = ["8,2,768,512,2048", "64,6,512,128,2048", "8,2,256,128,4096", "8,2,256,128,1024"]
GPU_ADAPES = ["8,2,2048,1408,16384", "64,6,2048,1408,16384"]
PEERS = ["eager", "grouped_mm", "batched_mm"]
MAX_GATHERED_BYTES = 1 << 30
"""batched_mm copies the weights of every pair; beyond this it is left out."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer."""

    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    num_tokens: int

    @property
    def flops(self) -> int:
        """Operations of the nine matrix products of forward and backward."""
        num_pairs = self.num_tokens * self.num_experts_per_tok
        return 3 * 2 * num_pairs * 3 * self.hidden_size * self.intermediate_size

    @property
    def gathered_bytes(self) -> int:
        """Size of a copy of the gate and up weights for every pair, in fp32."""
        return self.num_tokens * self.num_experts_per_tok * 2 * self.intermediate_size * self.hidden_size * 4


class Layer:
    """Stock experts with random routing, and one step of them under any registered implementation."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.shape, self.dtype = shape, dtype
        config = DeepseekV3Config(
            hidden_size=shape.hidden_size,
            moe_intermediate_size=shape.intermediate_size,
            n_routed_experts=shape.num_experts,
            num_experts_per_tok=shape.num_experts_per_tok,
        )
        self.config = config
        self.module = DeepseekV3Experts(config).to(device)
        for parameter in self.module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        scores_TE = torch.rand(shape.num_tokens, shape.num_experts, device=device)
        self.index_TK = scores_TE.topk(shape.num_experts_per_tok).indices
        self.weight_TK = torch.rand(self.index_TK.shape, device=device, dtype=dtype).requires_grad_()
        hidden_shape = shape.num_tokens, shape.hidden_size
        self.hidden_TD = torch.randn(hidden_shape, device=device, dtype=dtype).requires_grad_()
        self.grad_TD = torch.randn(hidden_shape, device=device, dtype=dtype)

    def step(self, implementation: str) -> Callable[[], None]:
        """Return a function that runs forward and backward once."""

        def run() -> None:
            self.config._experts_implementation = implementation
            with torch.autocast(self.hidden_TD.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                output = self.module(self.hidden_TD, self.index_TK, self.weight_TK)
            torch.autograd.grad(output, [self.hidden_TD, self.weight_TK, *self.module.parameters()], self.grad_TD)

        return run

    def padded_bmm(self) -> None:
        """Run the layer with every expert's rows padded to the longest, in three batched products."""
        order = expert_order(self.index_TK, self.shape.num_experts)
        ends = order.end_E.tolist()
        slices = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        rows_ERD = [self.hidden_TD[order.token_A[rows]] for rows in slices]
        padded_ERD = torch.nn.utils.rnn.pad_sequence(rows_ERD, batch_first=True)
        gate_up, down = (parameter.to(self.dtype) for parameter in self.module.parameters())
        gate_ERF, up_ERF = torch.bmm(padded_ERD, gate_up.transpose(1, 2)).chunk(2, dim=-1)
        output_ERD = torch.bmm(F.silu(gate_ERF) * up_ERF, down.transpose(1, 2))
        output_AD = torch.cat([output_ERD[e, : rows.stop - rows.start] for e, rows in enumerate(slices)])
        weighted_AD = output_AD * self.weight_TK.reshape(-1, 1)[order.assignment_A]
        output = torch.zeros_like(self.hidden_TD).index_add(0, order.token_A, weighted_AD)
        torch.autograd.grad(output, [self.hidden_TD, self.weight_TK, *self.module.parameters()], self.grad_TD)


def bound(shape: Shape, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that multiplies what the layer multiplies, with equal loads, and does nothing else."""
    rows, hidden, intermediate = (
        shape.num_tokens * shape.num_experts_per_tok // shape.num_experts,
        shape.hidden_size,
        shape.intermediate_size,
    )

    def random(*sizes: int) -> Tensor:  # a GPU multiplies zeros faster
        return torch.randn(sizes, device=device, dtype=dtype)

    x, act, gate_up = random(rows, hidden), random(rows, intermediate), random(rows, 2 * intermediate)
    w_up, w_down = random(2 * intermediate, hidden), random(hidden, intermediate)
    to_x, to_act, to_gate_up, to_up, to_down = (torch.empty_like(y) for y in (x, act, gate_up, w_up, w_down))

    def run() -> None:
        for _ in range(shape.num_experts):
            torch.mm(x, w_up.t(), out=to_gate_up)
            torch.mm(act, w_down.t(), out=to_x)
            torch.mm(x, w_down, out=to_act)
            torch.mm(x.t(), act, out=to_down)
            torch.mm(gate_up, w_up, out=to_x)
            torch.mm(gate_up.t(), x, out=to_up)

    return run


def contestants(layer: Layer, device: torch.device) -> Functions:
    """Return everything that is timed, by name."""
    own = ["cpu", "grouped_mm", "reference"] if device.type == "cpu" else ["grouped_mm", "reference"]
    functions: dict[str, Callable[[], None]] = {"bound": bound(layer.shape, device, layer.dtype)}
    for name in own:
        functions[f"ours: {name}"] = layer.step(register_experts(name, device, layer.dtype, use_fp8=False))
    fp8 = "triton_fp8" if multiplies_fp8(device) else "fp8_emulated"
    functions[f"ours: {fp8}"] = layer.step(register_experts(fp8, device, layer.dtype, use_fp8=True))
    for peer in PEERS:
        if peer != "batched_mm" or layer.shape.gathered_bytes <= MAX_GATHERED_BYTES:
            functions[f"transformers: {peer}"] = layer.step(peer)
    return functions | {"padded bmm": layer.padded_bmm}


def measured(shape: Shape, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the medians of one shape, in milliseconds, and what they amount to."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = Layer(shape, device, dtype)
    found = medians_s(contestants(layer, device), rounds, device)
    return {
        "shape": asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "gflop": round(shape.flops / 1e9, 2),
        "milliseconds": {name: round(seconds * 1e3, 2) for name, seconds in found.items()},
        "share_of_bound": {name: round(found["bound"] / seconds, 3) for name, seconds in found.items()},
        "tflop_per_s": {name: round(shape.flops / seconds / 1e12, 3) for name, seconds in found.items()},
    }


def table(result: dict[str, Any]) -> str:
    """Return one shape's result as text."""
    sizes = ", ".join(f"{name} {value}" for name, value in result["shape"].items())
    lines = [f"\n{sizes}; {result['dtype']}, {result['gflop']} GFLOP forward + backward"]
    lines.append(f"{'':28}{'ms':>10}{'of bound':>10}{'TFLOP/s':>10}")
    for name, milliseconds in sorted(result["milliseconds"].items(), key=lambda item: item[1]):
        share, speed = result["share_of_bound"][name], result["tflop_per_s"][name]
        lines.append(f"{name:28}{milliseconds:10.2f}{share:10.1%}{speed:10.3f}")
    return "\n".join(lines)


def main(
    shape: Annotated[list[str] | None, typer.Option(help="E,K,D,F,T; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(help="Times that each contestant runs.")] = 15,
    threads: Annotated[int, typer.Option(help="Threads of the CPU.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Time one layer of experts under every backend."""
    check_json(output)
    torch.set_num_threads(threads)
    target = best_device(device)
    shapes = shape or (GPU_ADAPES if target.type == "cuda" else SHAPES)
    results = {"conditions": conditions(target), "shapes": []}
    print(json.dumps(results["conditions"]))
    for text in shapes:
        results["shapes"].append(measured(Shape(*map(int, text.split(","))), target, rounds))
        print(table(results["shapes"][-1]))
    if output is not None:
        output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command(main)

"""What torch.compile leaves of a layer's traffic: `python -m tests.gpu_model.compiled CONFIG NUM_TOKENS` prints JSON.

Inductor lowers a layer's forward and backward pass and fuses it, as it would for a GPU, and each kernel that it would
generate is charged for the buffers that it reads and writes. No code is generated. Counted apart are matrix products,
attention (an operator of its own, as on CUDA) and the rest, which is what fusion can save; it includes casts of the
layer's weights, so bytes per token fall with the number of tokens.

What differs from a GPU: the tensors lie on a CPU, so decisions that inductor takes by the device (which reductions it
splits) are a CPU's.
"""

import json
import sys
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import detect_fake_mode
from torch._inductor.compile_fx import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsv3.kernels import grouped_mm, registry
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3DecoderLayer, DeepseekV3RotaryEmbedding
from tests.committed import PROJECT
from tests.gpu_model.step import attention, gathered_sum

NAMES = {"gpu_model_attention": "attention", "mm": "products"}
"""Part of an operator's name → what it is counted as; else it is `rest`."""


class Kernels:
    """Counts the kernels of every graph that it is given to compile, and runs the graph as it is."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=self.count)

    def count(self, graph: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        fake_mode = detect_fake_mode(inputs)
        assert fake_mode is not None
        view_to_reshape(graph)
        with V.set_fake_mode(fake_mode):
            FakeTensorProp(graph, mode=fake_mode).propagate_dont_convert_inputs(*inputs)
            post_grad_passes(graph, is_inference=False)
            output = graph.graph.output_node()
            output.meta.setdefault("user_visible_output_idxs", [])
            output.meta.setdefault("original_output_strides", [None] * len(output.args[0]))
            lowering = GraphLowering(graph, shape_env=fake_mode.shape_env)
            with DebugContext(), V.set_graph_handler(lowering):
                lowering.run(*inputs)
                lowering.init_wrapper_code()
                lowering._update_scheduler()
                for node in lowering.scheduler.nodes:
                    self.charge(node)

        def run(arguments: list[Any]) -> Any:
            return graph.forward(*arguments)

        run._boxed_call = True
        return run

    def charge(self, node: Any) -> None:
        kernel = type(node).__name__
        if kernel == "NopKernelSchedulerNode":
            return
        operator = str(getattr(node.node, "op_overload", None) or getattr(node.node, "python_kernel_name", ""))
        kind = next((kind for part, kind in NAMES.items() if part in operator), "rest")
        self.bytes[kind] += node.get_read_write_buffers_sizes()
        self.launches[kind] += 1


def an_attention(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[Any, None]:
    """Return what transformers asks of an attention: the output as (B, S, heads, width)."""
    return attention(query, key, value).transpose(1, 2), None


def counted(name: str, num_tokens: int) -> dict[str, Any]:
    """Return bytes per token and launches of one MoE layer of mini_model/`name`, under bf16 autocast."""
    registry.multiplies_bf16 = lambda device: True
    grouped_mm.sum_per_token = gathered_sum
    ALL_ATTENTION_FUNCTIONS.register("gpu_model", an_attention)
    config = DeepseekV3Config.from_json_file(PROJECT / "mini_model" / name)
    config._attn_implementation = "gpu_model"
    experts = registry.register_experts("grouped_mm", torch.device("cpu"), torch.bfloat16, False)
    config._experts_implementation = experts
    torch.manual_seed(0)
    layer = DeepseekV3DecoderLayer(config, config.num_hidden_layers - 1).train()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    hidden = torch.randn(1, num_tokens, config.hidden_size, requires_grad=True)
    positions = DeepseekV3RotaryEmbedding(config)(hidden, torch.arange(num_tokens)[None])
    kernels = Kernels()
    compiled: Any = torch.compile(layer, backend=kernels, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = compiled(hidden, None, True, position_embeddings=positions)[0]
    output.backward(torch.ones_like(output))
    per_token = {kind: round(number / num_tokens) for kind, number in kernels.bytes.items()}
    return {"bytes_per_token": per_token, "launches": dict(kernels.launches)}


if __name__ == "__main__":
    json.dump(counted(sys.argv[1], int(sys.argv[2])), sys.stdout)

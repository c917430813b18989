"""`train.torch_compile` with every backend that a CPU runs.

Dynamo and AOTAutograd do what they do for a GPU; the code generator behind them is left out, for it takes a minute per
backend and a C++ compiler.
"""

import functools

import pytest
import torch

from dsv3.training.loop import accumulate_gradients
from tests.dsv3.kernels.cases import relative_error
from tests.training_inputs import WIDE, started_run

TOLERANCE = 1e-6
"""The same operators; a graph that is cut in pieces may add gradients up in another order."""
ONE_LAYER = {**WIDE, "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
CASES = {
    "cpu": {},
    "reference": {},
    "grouped_mm": {},
    "bf16_emulated": {"precision": "bf16"},
    "fp8_emulated": {"use_fp8": True},
}
WHOLE = {"cpu", "bf16_emulated", "fp8_emulated"}
"""Backends whose model is one graph; the others' shapes, or fake kernels, are beyond the compiler."""


@pytest.fixture
def num_graphs(monkeypatch):
    """Have models compiled without a code generator; return a list that gets an entry per graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiling = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def gradients(folder, experts, **train):
    """Return the loss parts, the routers' counts, and the gradients of one step."""
    changes = {"experts": experts, "gradient_accumulation_steps": 1, "block_size": 16, **CASES[experts], **train}
    run = started_run(folder, architecture=ONE_LAYER, train=changes)
    run.model.train()
    losses = accumulate_gradients(run, run.micro_batches(), 0.3)
    loads = torch.stack([router.expert_load for _, router in run.model.routers()])
    return losses, loads, {name: parameter.grad for name, parameter in run.model.named_parameters()}


# Dynamo itself looks at the .grad of what flows from one graph into the next.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("experts", list(CASES))
def test_a_compiled_training_step_gives_the_eager_gradients(tmp_path, monkeypatch, num_graphs, experts):
    for module in ("dsv3.kernels.registry", "dsv3.training.precision"):
        monkeypatch.setattr(f"{module}.multiplies_bf16", lambda device: False)
    losses, loads, eager = gradients(tmp_path, experts)
    assert not num_graphs
    compiled_losses, compiled_loads, compiled = gradients(tmp_path, experts, torch_compile=True)
    assert (len(num_graphs) == 1) == (experts in WHOLE)
    assert relative_error(compiled_losses, losses) < TOLERANCE
    assert torch.equal(compiled_loads, loads)
    for name, gradient in eager.items():
        assert relative_error(compiled[name], gradient) < TOLERANCE, name

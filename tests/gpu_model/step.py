"""A training step of a Hopper GPU, counted without one: `python step.py PRESET [section.key=value ...]` prints JSON.

The real model, loss, optimizer and loop run on fake tensors, which have shapes and no numbers. Every operator that
torch dispatches is seen, and is charged one launch and the bytes of its operands and results, each read or written
once. The places where the host waits for the device are counted, and so are the bytes of all storages that are alive.

What differs from a GPU, and why: the tensors say that they lie on a CPU, because torch's build for CPUs can't
differentiate fake ones of CUDA. So what asks for the device is told that it is an H100; attention and RMSNorm, one
kernel each way on CUDA, are one operator each way here; and the Triton kernels are counted where they would be
launched. Launches are an estimate: an operator counts as one, which may be several kernels, and torch multiplies
gradients by the clipping factor one by one here, all together on CUDA. A copy from the host, which lets it wait where
its memory is not pinned, is not seen: everything lies on the host here.
"""

import json
import sys
from collections import Counter, defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dsv3.data.batches import StepLayout
from dsv3.kernels import grouped_mm, op, triton_experts, triton_launch, triton_linear
from dsv3.sizing.chunked_loss import CHUNK_BYTES
from dsv3.training import loop, optimizer, setup
from dsv3.training.budget import Budget
from dsv3.training.optimizer import Optimizer, parameter_groups
from dsv3.training.state import TrainState
from mini_model import modeling_deepseek
from tests.dsv3.sizing.memory_probe import LiveBytes
from tests.gpu_model.presets import preset_params

GPU, CPU = torch.device("cuda"), torch.device("cpu")
UNCOUNTED = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view",
    "lift_fresh", "device", "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip
"""Operators that launch nothing, beside views."""
GATHERS = {"index", "gather", "index_select", "embedding"}
"""Operators that read of their first operand only what they return."""
BODIES = {
    name: getattr(module, body)
    for module, prefix in ((triton_linear, "linear_triton"), (triton_experts, "experts_triton"))
    for name, body in ((prefix, "_forward"), (f"{prefix}_backward", "_backward"))
} | {"quantized_weight": triton_linear._quantized_weight}
"""Custom operators that launch several kernels, and the functions that launch them."""
MEASURED = 0.0
"""What every number is that the host reads."""


class Step(TorchDispatchMode):
    """Counts by phase: forward, backward, clip, metrics, optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "setup"
        self.launches: dict[str, Counter] = defaultdict(Counter)
        self.bytes: dict[str, Counter] = defaultdict(Counter)
        self.waits: Counter = Counter()
        self.memory = LiveBytes([])

    def record(self, name: str, num_bytes: int) -> None:
        self.launches[self.phase][name] += 1
        self.bytes[self.phase][name] += num_bytes

    def read(self, tensor: Tensor) -> Tensor:
        """Return what the host gets, for which it waits unless it has it."""
        self.waits[self.phase] += not is_on_host(tensor)
        with unset_fake_temporarily():
            return torch.full(tensor.shape, MEASURED, dtype=tensor.dtype)

    def numbers(self, tensor: Tensor):
        """Return the same as Python's numbers."""
        host = self.read(tensor)
        with unset_fake_temporarily():
            return host.tolist()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.split("::")[1], kwargs or {}
        if name == "_local_scalar_dense":
            return self.numbers(args[0])
        if name in BODIES and func.namespace == "dsv3":
            with self:
                return BODIES[name](*args, **kwargs)
        operands, out = tensors_in((args, kwargs)), func(*args, **kwargs)
        results = tensors_in(out)
        if operands and all(map(is_on_host, operands)):
            for tensor in results:
                tensor.is_on_host = True
            return out
        for tensor in results:
            self.memory.add(tensor)
        if not func.is_view and name not in UNCOUNTED:
            self.record(name, moved_bytes(name, operands, args, results))
        return out


def tensors_in(values) -> list[Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, Tensor)]


def is_on_host(tensor: Tensor) -> bool:
    """Whether the host has the numbers: what it has read is real, and what is computed of that is marked."""
    return not isinstance(tensor, FakeTensor) or getattr(tensor, "is_on_host", False)


def moved_bytes(name: str, operands: list[Tensor], args: tuple, results: list[Tensor]) -> int:
    """Bytes that an operator reads and writes; what it changes in place is read and written."""
    read, written = sum(map(num_bytes, operands)), sum(map(num_bytes, results))
    if name in GATHERS:
        read += num_bytes(results[0]) - num_bytes(operands[0])
    elif name.startswith("_fused_adamw"):
        written = read - sum(map(num_bytes, args[1]))  # all but the gradients
    elif name in ("copy_", "fill_", "zero_"):
        read -= num_bytes(operands[0])
    return read + written


def num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; a dimension that repeats the same numbers counts once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size


class Launches:
    """Stands for the Triton kernels: a launch reads or writes each of its tensors once."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __getattr__(self, name: str):
        def launch(*args, **_):
            tensors = {id(argument): argument for argument in args if isinstance(argument, Tensor)}
            self.step.record(name, sum(map(num_bytes, tensors.values())))

        return defaultdict(lambda: launch)


def opaque(name: str, forward, backward, keeps_output: bool):
    """Return an operator of one launch each way; `forward` and `backward` make the results' shapes."""
    forward_op = op.op(f"gpu_model_{name}", forward, forward)
    backward_op = op.op(f"gpu_model_{name}_backward", backward, backward)

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *(output if keeps_output else output[1:]))

    def gradients(ctx, grad, *_):
        return backward_op(grad, *ctx.saved_tensors)

    forward_op.register_autograd(gradients, setup_context=save)
    return forward_op


def _attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_empty(batch, heads, length, dtype=torch.float32)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


ATTENTION = opaque("attention", _attention, _attention_backward, keeps_output=True)
RMS_NORM = opaque("rms_norm", _rms_norm, _rms_norm_backward, keeps_output=False)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
    assert attn_mask is None, "a mask is another kernel"
    return ATTENTION(query, key, value)[0]


def rms_norm(x, shape, weight=None, eps=None):
    return RMS_NORM(x, weight)[0]


def gathered_sum(rows: Tensor, position: Tensor) -> Tensor:
    """`dsv3.kernels.permute.sum_per_token` on CUDA."""
    return rows[position].sum(1)


def pretend_to_be_a_gpu(step: Step) -> None:
    """Answer as an H100 does wherever the code asks for the device."""
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_name = lambda device=None: "H100"
    F.scaled_dot_product_attention, F.rms_norm = attention, rms_norm
    setup.choose_attention = lambda *_: "flash"  # as `attention` above counts; torch can't be asked for a GPU's here
    modeling_deepseek.is_plain_linear = lambda linear: True  # it asks for the weight's class, which is another here
    grouped_mm.sum_per_token = triton_experts.sum_per_token = gathered_sum
    optimizer.fuses_bf16_moments = lambda device: True  # the header of torch's kernel says so: test_step.py
    CHUNK_BYTES["cpu"] = CHUNK_BYTES["cuda"]
    triton_launch.kernels = Launches(step)
    triton_launch.gemm_options = lambda device: triton_launch.HOPPER
    FakeTensor.cpu = lambda tensor: step.read(tensor)
    FakeTensor.tolist = lambda tensor: step.numbers(tensor)
    advance = TrainState.advance

    def advance_on_the_host(*args) -> None:
        with unset_fake_temporarily():
            advance(*args)

    TrainState.advance = advance_on_the_host


class Machine:
    """As much of Accelerate as one process needs; tells which phase has begun."""

    device = CPU

    def __init__(self, step: Step) -> None:
        self.step = step

    def no_sync(self, forward):
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.step.phase = "backward"
        loss.backward()

    def clip_grad_norm_(self, parameters, max_norm: float) -> Tensor:
        self.step.phase = "clip"
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        self.step.phase = "metrics"
        return norm

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


def counted(preset: str, overlay: dict) -> dict:
    """Return the counts of the second optimizer step of a preset, which finds its optimizer's state."""
    params = preset_params(preset, overlay)
    step = Step()
    pretend_to_be_a_gpu(step)
    architecture = json.loads(Path(params.model.config).read_text(encoding="utf-8"))
    plan = SimpleNamespace(
        params=params,
        architecture=SimpleNamespace(**architecture),
        meta={"vocab_size": architecture["vocab_size"], "bos_token_id": architecture["bos_token_id"]},
        initial_weights=None,
        teachers=(),
        budget=Budget.even(2, params.train.gradient_accumulation_steps),
        total_steps=2,
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, chosen = setup.prepare_model(plan, GPU)
        for tensor in [*model.parameters(), *model.buffers()]:
            step.memory.add(tensor)
        with step:
            run = training(plan, model, step)
            loop.train(run, [], save=print)
    return {
        "chosen": chosen.metrics(),
        "launches": {phase: dict(counts) for phase, counts in step.launches.items()},
        "bytes": {phase: dict(counts) for phase, counts in step.bytes.items()},
        "waits": dict(step.waits),
        "peak_bytes": step.memory.peak,
    }


def training(plan, model, step: Step) -> loop.Run:
    """Return a training whose last step alone is counted."""
    train, budget = plan.params.train, plan.budget
    updates = Optimizer(parameter_groups(model, train), train, torch.bfloat16)

    def forward(**inputs):
        step.phase = "forward"
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=not train.gradient_checkpointing):
            return model(**inputs)

    def micro_batches():
        for number in range(budget.total):
            if number == budget.starts[-2]:
                for counts in (step.launches, step.bytes, step.waits):
                    counts.clear()
                step.memory.peak = step.memory.live
            step.phase = "data"
            yield torch.zeros(train.per_device_train_batch_size, train.block_size + 1, dtype=torch.int64)

    run = loop.Run(
        plan=plan,
        accelerator=Machine(step),
        layout=StepLayout(train.per_device_train_batch_size, budget.starts),
        model=model,
        forward=forward,
        optimizer=updates,
        state=TrainState(),
        interruption=SimpleNamespace(signal_number=0),
    )
    object.__setattr__(run, "micro_batches", micro_batches)
    update = updates.step

    def phased_step():
        step.phase = "optimizer"
        update()
        step.phase = "after"

    updates.step = phased_step
    return run


if __name__ == "__main__":
    overlay = {name: json.loads(value) for name, value in (pair.split("=") for pair in sys.argv[2:])}
    json.dump(counted(sys.argv[1], overlay), sys.stdout)

"""What a device's allocator hands out, against the estimates of dsv3.sizing (their twin is tests/dsv3/sizing)."""

import gc

import pytest
import torch

from dsv3.fp8.recipe import DEEPSEEK_RECIPE
from dsv3.kernels.convert import convert, emulate_bf16
from dsv3.kernels.registry import register_experts
from dsv3.kernels.weight_cache import cached_weights
from dsv3.params.architecture import Architecture
from dsv3.params.expert_backends import BACKENDS
from dsv3.params.optimizers import OPTIMIZERS
from dsv3.sizing.activations import Workload, moe_layer_bytes
from dsv3.sizing.memory import training_memory
from dsv3.training.optimizer import Optimizer, parameter_groups
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM, DeepseekV3MoE
from tests.committed import DEFAULTS
from tests.gpu.sizes import NANO_SIZES
from tests.training_inputs import MICRO

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = MICRO | NANO_SIZES | {"vocab_size": 2048, "max_position_embeddings": 512}
SERVED = [
    (experts, precision)
    for experts in BACKENDS
    for precision in DTYPES
    # What runs on a CPU only, grouped_mm's loop over experts in fp32, and emulations where nothing is to be emulated.
    if experts != "cpu" and (experts, precision) not in {("grouped_mm", "fp32"), ("bf16_emulated", "fp32")}
    if not (experts == "fp8_emulated" and precision == "bf16")
]


def allocated_bytes() -> int:
    """Bytes that are asked for and alive; `memory_allocated` counts what the allocator rounds them up to."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def peak_bytes() -> int:
    return torch.cuda.memory_stats()["requested_bytes.all.peak"]


def start_libraries(device: torch.device) -> None:
    """Let cuBLAS take its workspaces, for this thread and for the one of the backward pass."""
    for dtype in DTYPES.values():
        x = torch.randn(256, 256, device=device, dtype=dtype, requires_grad=True)
        (x @ x).sum().backward()
    torch.cuda.synchronize()


def model_on(device, experts, precision, monkeypatch):
    torch.manual_seed(0)
    config = DeepseekV3Config(**SIZES)
    config._attn_implementation = "sdpa"
    model = DeepseekV3ForCausalLM(config).train().to(device)
    use_fp8 = "fp8" in experts
    with monkeypatch.context() as patch:
        if experts == "fp8_emulated":
            patch.setattr("dsv3.kernels.convert.multiplies_fp8", lambda device: False)
        model.set_experts_implementation(register_experts(experts, device, DTYPES[precision], use_fp8))
        if use_fp8:
            convert(model, DEEPSEEK_RECIPE, device)
    if experts == "bf16_emulated":
        emulate_bf16(model)
    return model


def computes_in_bf16(experts, precision):
    """An emulation runs in fp32, without autocast."""
    return precision == "bf16" and not experts.endswith("_emulated")


@pytest.mark.parametrize(("experts", "precision"), SERVED)
def test_an_moe_layer_keeps_what_the_estimate_says_with_every_backend(hopper, monkeypatch, experts, precision):
    start_libraries(hopper)
    model = model_on(hopper, experts, precision, monkeypatch)
    moe = next(module for module in model.modules() if isinstance(module, DeepseekV3MoE))
    is_bf16 = computes_in_bf16(experts, precision)

    def run(hidden):
        with torch.autocast(hopper.type, torch.bfloat16, enabled=is_bf16):
            output, logits, _ = moe(hidden)
            return output, (logits.sigmoid() * 2).exp()  # the sequence-wise loss keeps the scores once more

    with cached_weights(model):
        for _ in range(2):  # the first pass starts libraries, and is forgotten
            gc.collect()
            before = allocated_bytes()
            hidden = torch.randn(8, 256, SIZES["hidden_size"], device=hopper, requires_grad=True)
            results = run(hidden)
            kept = allocated_bytes() - before - results[0].nbytes  # the output belongs to whoever takes it
            del results, hidden
    w = Workload(8, 256, hopper.type, "bf16" if is_bf16 else "fp32", experts)
    assert kept == pytest.approx(moe_layer_bytes(Architecture(**SIZES), w), rel=0.1)


@pytest.mark.parametrize(("experts", "precision"), [("grouped_mm", "bf16"), ("triton_fp8", "bf16")])
def test_the_peak_of_two_real_optimizer_steps_is_the_estimate_to_a_tenth(hopper, monkeypatch, experts, precision):
    start_libraries(hopper)
    train = DEFAULTS.train.model_copy(
        update={"per_device_train_batch_size": 16, "block_size": 512, "precision": precision, "experts": experts}
        | {"use_fp8": experts == "triton_fp8", "optim": "adamw", "gradient_accumulation_steps": 1}
    )
    gc.collect()
    before = allocated_bytes()
    model = model_on(hopper, experts, precision, monkeypatch)
    stepper = Optimizer(parameter_groups(model, train), train, DTYPES[precision])
    tokens = torch.randint(0, SIZES["vocab_size"], (16, 512), device=hopper)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with cached_weights(model):
            with torch.autocast(hopper.type, torch.bfloat16):
                loss = model(tokens, labels=tokens, sequence_loss_weight=1e-4).loss
            loss.backward()
        stepper.step()
        stepper.zero_grad(set_to_none=True)
    estimate = training_memory(Architecture(**SIZES), train, hopper.type).peak_bytes
    assert estimate == pytest.approx(peak_bytes() - before, rel=0.1)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_moments_in_the_cpus_memory_give_the_same_weights(hopper, monkeypatch, optim):
    train = DEFAULTS.train.model_copy(update={"precision": "bf16", "optim": optim})
    weights = []
    for offloads in (False, True):
        torch.manual_seed(0)
        model = model_on(hopper, "grouped_mm", "bf16", monkeypatch)
        stepper = Optimizer(parameter_groups(model, train), train, torch.bfloat16, offloads)
        for step in range(2):
            generator = torch.Generator(hopper).manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, device=hopper, generator=generator)
            stepper.step()
        moments = [value for state in stepper.state.values() for name, value in state.items() if name != "step"]
        assert {moment.is_pinned() for moment in moments} == {offloads}
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(own, offloaded) for own, offloaded in zip(*weights, strict=True))

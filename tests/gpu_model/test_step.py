"""What a GPU's step costs by counts: launches, bytes and waits of the presets for an H100; tests/gpu measures times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3.params.architecture import read_architecture
from dsv3.sizing.memory import training_memory
from tests.gpu_model.presets import preset_params

CASES = {
    "5.69B": ("mini_h100", {}),
    "5.69B, FP8": ("mini_h100", {"train.use_fp8": True}),
    "5.69B, Muon": ("mini_h100", {"train.optim": "muon"}),
    "tiny": ("h100_80gb", {}),
}
GB = 10**9


@pytest.fixture(scope="module", params=CASES)
def counted(request) -> tuple[str, dict]:
    """Return a case, and what tests/gpu_model/step.py counts of it, in a process that takes itself for a GPU's."""
    preset, overlay = CASES[request.param]
    pairs = [f"{name}={json.dumps(value)}" for name, value in overlay.items()]
    command = [sys.executable, "-m", "tests.gpu_model.step", preset, *pairs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout)


def test_a_step(counted):
    """One test, because each case is counted for half a minute, by whichever process asks for it."""
    case, step = counted
    uses_fp8, is_large = "FP8" in case, case.startswith("5.69B")
    assert step["chosen"]["precision"] == ("fp8" if uses_fp8 else "bf16")
    assert step["chosen"]["experts"].startswith("dsv3_triton_fp8" if uses_fp8 else "dsv3_grouped_mm")
    assert step["chosen"]["cross_entropy"] == "chunked"
    check_waits(step)
    check_memory(case, step)
    if is_large:
        check_loss(step)
        assert sum(sum(counts.values()) for counts in step["launches"].values()) <= 26_000
    if case == "5.69B":
        assert sum(step["bytes"]["optimizer"].values()) <= 130 * GB  # 20 bytes of each weight: read and written once


def check_waits(step: dict) -> None:
    """The host reads what the step measured, once, before the optimizer; else it runs ahead of the device."""
    assert {phase: count for phase, count in step["waits"].items() if count} == {"metrics": 1}


def check_memory(case: str, step: dict) -> None:
    """The estimate by which a training is refused, against all storages that are alive."""
    preset, overlay = CASES[case]
    params = preset_params(preset, overlay)
    estimate = training_memory(read_architecture(Path(params.model.config)), params.train, "cuda")
    assert estimate.peak_bytes == pytest.approx(step["peak_bytes"], rel=0.03)


def check_loss(step: dict) -> None:
    """The gradient of the head, 1 GB in fp32, is passed over once per chunk of logits."""
    assert step["bytes"]["forward"]["add_"] <= 45 * GB
    assert step["launches"]["forward"]["_log_softmax"] == 16


def test_compilation_leaves_half_of_a_layers_traffic_beside_products_and_attention():
    """Of tiny's MoE layer, at one sequence of its presets: 466 kB per token in eager, of which fusion leaves 224."""
    command = [sys.executable, "-m", "tests.gpu_model.compiled", "config_tiny.json", "4096"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes_per_token"]["rest"] <= 230_000
    assert found["launches"]["attention"] == 2
    assert found["launches"]["rest"] <= 100


def test_torchs_fused_adamw_takes_bf16_moments_on_cuda():
    """`fuses_bf16_moments` finds it out where the GPU is; the counts above take it from the source of the kernel."""
    header = Path(torch.__file__).parent / "include/ATen/native/cuda/fused_adam_utils.cuh"
    assert "struct FusedAdamMathFunctorMP" in header.read_text(encoding="utf-8")

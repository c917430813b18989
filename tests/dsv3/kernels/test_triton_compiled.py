"""The Triton kernels without a GPU, second way: what the compiler makes of them, ahead of time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is installed with CUDA builds of torch, and by the dev extra")

SHARED_BYTES = {90: 227 * 1024, 89: 99 * 1024}
"""What one block of threads may use on Hopper and on Ada."""
INSTRUCTIONS = {
    90: ("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3", "QGMMA"),
    89: ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", "QMMA"),
}


def compile_for(capability: int, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run tests/dsv3/kernels/compiled.py."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path.cwd()), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(Path(__file__).with_name("compiled.py")), str(capability)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", params=[90, 89], ids=["hopper", "ada"])
def compiled(request, tmp_path_factory) -> tuple[int, dict]:
    """Return the capability, and what tests/dsv3/kernels/compiled.py found for it."""
    done = compile_for(request.param, tmp_path_factory.mktemp("triton"))
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout)


def is_gemm(kernel: dict) -> bool:
    return not kernel["kernel"].startswith("quantize")


def test_every_kernel_is_compiled(compiled):
    """Found in the source: importing the kernels here would decorate them in this process."""
    source = (Path.cwd() / "dsv3/kernels/triton_fp8.py").read_text(encoding="utf-8")
    _, kernels = compiled
    assert {kernel["kernel"] for kernel in kernels.values()} == set(re.findall(r"^def (\w+_kernel)\(", source, re.M))
    assert sum(map(is_gemm, kernels.values())) == 5
    assert len(kernels) == 17


def test_the_gemms_run_on_the_fp8_tensor_cores_and_on_nothing_else(compiled):
    capability, kernels = compiled
    ptx, sass = INSTRUCTIONS[capability]
    for name, kernel in kernels.items():
        if is_gemm(kernel):
            assert kernel["ptx"] == [ptx], name
            assert kernel["tensor_cores"] == [sass], name


def test_nothing_spills_and_everything_fits_into_shared_memory(compiled):
    capability, kernels = compiled
    for name, kernel in kernels.items():
        assert (kernel["spills"], kernel["stack_bytes"]) == (0, 0), name
        assert kernel["registers"] < 255, name  # the most that a thread can have
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability], name


def test_the_quantizers_divide_exactly_and_fuse_no_product_with_a_sum(compiled):
    """Otherwise their numbers would differ from the definition's in the last bit, and between devices."""
    _, kernels = compiled
    for name, kernel in kernels.items():
        if not is_gemm(kernel):
            assert kernel["divisions"] == ["div.rn.f32"], name
            assert kernel["fused"] == 0, name


def test_for_ampere_nothing_compiles_which_is_why_the_registry_refuses_it(tmp_path):
    done = compile_for(80, tmp_path)
    assert done.returncode != 0
    assert "fp8e4nv not supported in this architecture" in done.stderr

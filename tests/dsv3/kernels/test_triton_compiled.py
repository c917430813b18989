"""The Triton kernels without a GPU, second way: what the compiler makes of them, ahead of time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is installed with CUDA builds of torch, and by the dev extra")

GEMMS = ("gemm", "gemm, gathered", "wgrad")
QUANTISERS = ("rows", "rows, power of two", "weight", "columns", "columns, gathered")
SHARED_BYTES = {90: 227 * 1024, 89: 99 * 1024}
"""What one block of threads may use on Hopper and on Ada."""
INSTRUCTIONS = {
    90: ("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3", "QGMMA"),
    89: ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", "QMMA"),
}


@pytest.fixture(scope="module", params=[90, 89], ids=["hopper", "ada"])
def compiled(request, tmp_path_factory) -> tuple[int, dict]:
    """Return the capability, and what tests/dsv3/kernels/compiled.py found for it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path.cwd()), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, str(Path(__file__).with_name("compiled.py")), str(request.param)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout)


def test_the_gemms_run_on_the_fp8_tensor_cores(compiled):
    capability, kernels = compiled
    ptx, sass = INSTRUCTIONS[capability]
    for name in GEMMS:
        assert kernels[name]["ptx"] == [ptx]
        assert kernels[name]["sass"] == [sass]


def test_nothing_spills_and_everything_fits_into_shared_memory(compiled):
    capability, kernels = compiled
    assert set(kernels) == {*GEMMS, *QUANTISERS}
    for name, kernel in kernels.items():
        assert kernel["stack_bytes"] == 0, name
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability], name


def test_the_quantisers_divide_exactly_and_fuse_no_product_with_a_sum(compiled):
    """Otherwise their numbers would differ from the definition's in the last bit, and between devices."""
    _, kernels = compiled
    for name in QUANTISERS:
        assert kernels[name]["divisions"] == ["div.rn.f32"]
        assert kernels[name]["fused"] == 0

"""What the tests on a GPU start from: `python -m pytest -m gpu`. Where no suitable device is, each says what it needs.

To see that their bodies run, without learning what a GPU makes of them:

    DSV3_GPU_REHEARSAL=1 TRITON_INTERPRET=1 python -m pytest -m gpu

takes the CPU for the device, small sizes, and Triton's interpreter. Speed, memory and the compiler can't be rehearsed.
"""

import os
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

REHEARSES = os.environ.get("DSV3_GPU_REHEARSAL") == "1"


@pytest.fixture(autouse=True)
def same_start() -> None:
    """Seed as everywhere, but let torch choose its algorithms as in a training, where it may be fast."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)


def device_of(capability: tuple[int, int]) -> torch.device:
    """Return the device; skip the test where it is missing or too old."""
    if REHEARSES:
        return torch.device("cpu")
    wanted = ".".join(map(str, capability))
    if not torch.cuda.is_available():
        pytest.skip(f"needs a CUDA device of compute capability {wanted} or higher; there is none")
    found = torch.cuda.get_device_capability()
    if found < capability:
        pytest.skip(f"needs a CUDA device of compute capability {wanted} or higher; this one has {found}")
    return torch.device("cuda")


@pytest.fixture
def device() -> torch.device:
    """A GPU that multiplies bf16."""
    return device_of((8, 0))


@pytest.fixture
def fp8_device() -> torch.device:
    """A GPU that multiplies e4m3."""
    return device_of((8, 9))


@pytest.fixture
def hopper() -> torch.device:
    """A GPU on which torch has grouped GEMMs."""
    if REHEARSES:
        pytest.skip("needs a GPU; speed, memory and compilers can't be rehearsed")
    return device_of((9, 0))


@pytest.fixture
def is_small(device: torch.device) -> bool:
    """Whether sizes have to be small, because nothing fast runs the test."""
    return device.type == "cpu"


@pytest.fixture
def checks(fp8_device: torch.device) -> ModuleType:
    """The checks of the Triton kernels, imported where they can run; memory that they may take is poisoned."""
    pytest.importorskip("triton", reason="needs Triton")
    if REHEARSES:
        sys.path.append(str(Path(__file__).parents[1] / "dsv3" / "kernels"))
        import interpreter_patch

        interpreter_patch.install()
    from tests.dsv3.kernels import kernel_checks

    poison(fp8_device)
    return kernel_checks


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that torch hands out next: what a kernel forgets to write will show."""
    sizes = [1 << 28, *[1 << 20] * 64] if device.type == "cuda" else []
    blocks = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes]
    del blocks

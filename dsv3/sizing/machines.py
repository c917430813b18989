"""Which machines a model can be trained on, by our own estimate of its memory.

A device's memory is what its driver reports, in GiB (an "80 GB" H100 has 79.6). A share of it is kept free for what the
estimate leaves out: the CUDA context, the libraries' workspaces, the allocator's fragmentation; on a CPU, the operating
system and Python.
"""

import shutil
from dataclasses import dataclass

from dsv3.params.architecture import Architecture
from dsv3.params.runtime import Device
from dsv3.params.train import TrainParams
from dsv3.sizing.memory import GIB, training_memory

MOST_SEQUENCES = 1024
"""Where the search for the largest forward pass ends."""

COMFORTABLE_SEQUENCES = 4
"""With fewer sequences in a forward pass, more frugal settings are looked at."""


@dataclass(frozen=True)
class Machine:
    """One device that a training may run on."""

    name: str
    device: Device
    memory_gib: float
    usable_share: float = 0.92

    @property
    def usable_bytes(self) -> int:
        """Bytes that the estimate may fill."""
        return int(self.memory_gib * self.usable_share * GIB)


USABLE_SHARE: dict[Device, float] = {"cpu": 0.8, "cuda": 0.92}
"""Of a device that is no row of `MACHINES`."""

MACHINES = (
    Machine("CPU, 8 GB", "cpu", 8, usable_share=0.7),
    Machine("CPU, 32 GB", "cpu", 32, usable_share=0.8),
    Machine("RTX 4060 8 GB", "cuda", 8.0),
    Machine("RTX 3060 12 GB", "cuda", 12.0),
    Machine("RTX 4090 24 GB", "cuda", 24.0),
    Machine("RTX 5090 32 GB", "cuda", 31.8),
    Machine("A100 40 GB", "cuda", 40.0),
    Machine("L40S 48 GB", "cuda", 45.0),
    Machine("A100 80 GB", "cuda", 80.0),
    Machine("H100 80 GB", "cuda", 79.6),
    Machine("H200 141 GB", "cuda", 140.4),
)


@dataclass(frozen=True)
class Fit:
    """Settings with which a model can be trained on a machine."""

    settings: str
    num_sequences: int
    """Sequences in one forward pass, a power of two."""


LADDER = (
    ("fp32 moments", {"adam_moments_dtype": "fp32", "gradient_checkpointing": False}),
    ("bf16 moments", {"adam_moments_dtype": "bf16", "gradient_checkpointing": False}),
    ("bf16 moments, checkpointing", {"adam_moments_dtype": "bf16", "gradient_checkpointing": True}),
)
"""Settings from the most comfortable to the most frugal, as changes to section `train`; AdamW throughout."""


def fits(a: Architecture, train: TrainParams, machine: Machine) -> bool:
    """Return whether training `a` as `train` says fits the machine."""
    return training_memory(a, train, machine.device).peak_bytes <= machine.usable_bytes


def best_fit(a: Architecture, train: TrainParams, sequence_tokens: int, machine: Machine) -> Fit | None:
    """Return the first settings of `LADDER` that leave room for `COMFORTABLE_SEQUENCES`, else those with the most room.

    None: nothing fits.
    """
    common = {"optim": "adamw", "precision": "auto", "experts": "auto", "use_fp8": False, "block_size": sequence_tokens}
    best = None
    for settings, changes in LADDER:
        num_sequences = most_sequences(a, train.model_copy(update=common | changes), machine)
        if num_sequences > (best.num_sequences if best else 0):
            best = Fit(settings, num_sequences)
        if num_sequences >= COMFORTABLE_SEQUENCES:
            break
    return best


def most_sequences(a: Architecture, train: TrainParams, machine: Machine) -> int:
    """Return the most sequences per forward pass that fit, a power of two up to `MOST_SEQUENCES`; 0: not even one."""
    num_sequences, largest = 1, 0
    while num_sequences <= MOST_SEQUENCES:
        if not fits(a, train.model_copy(update={"per_device_train_batch_size": num_sequences}), machine):
            break
        largest, num_sequences = num_sequences, 2 * num_sequences
    return largest


def has_nvidia_driver() -> bool:
    """Return whether NVIDIA's driver is installed here; asked instead of torch, which takes seconds to import."""
    return shutil.which("nvidia-smi") is not None

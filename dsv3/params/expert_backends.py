"""The expert backends by name: what each runs on, what it keeps for the backward pass, and which one `auto` takes.

Nothing here imports torch, so `train.experts` is validated, and a training's memory estimated, in the first second.
`dsv3.kernels.registry` adds the function of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.params.runtime import Device


@dataclass(frozen=True)
class Kept:
    """What a backend keeps of an assignment, a token and one of its experts, for the backward pass."""

    hidden_rows: int
    """Rows of hidden_size numbers; 0: it reads the tokens' own rows."""
    intermediate_rows: int
    """Rows of moe_intermediate_size numbers, gate and up among them."""
    indices: int
    """64-bit integers."""


@dataclass(frozen=True)
class ExpertBackend:
    """What a backend needs, and what it keeps."""

    devices: tuple[Device, ...]
    dtypes: tuple[str, ...]
    """Precisions that it serves."""
    kept: Kept
    is_fp8: bool = False
    is_emulated: bool = False
    """Computes in fp32 and rounds to the numbers of the format that it emulates."""
    alignment_bytes: int = 1
    """The rows that it multiplies are a multiple of so many bytes long."""

    @property
    def is_native_fp8(self) -> bool:
        """Whether it multiplies FP8 numbers, on a device that has the instructions."""
        return self.is_fp8 and not self.is_emulated

    def width_refusal(self, widths: Sequence[int], itemsize: int) -> str | None:
        """Return why it can't multiply rows of `widths` numbers of `itemsize` bytes (in FP8: of one), or None."""
        multiple = max(1, self.alignment_bytes // (1 if self.is_fp8 else itemsize))
        odd = [width for width in widths if width % multiple]
        return f"multiplies widths that are multiples of {multiple}, not {odd[0]}" if odd else None


ANY_DEVICE: tuple[Device, ...] = ("cpu", "cuda")
BF16, FP32_BF16, FLOATS = ("bf16",), ("fp32", "bf16"), ("fp64", "fp32", "bf16")

GATE_UP = Kept(hidden_rows=0, intermediate_rows=2, indices=1)
"""Gate, up and the order; everything else is computed again."""
OPERANDS = Kept(hidden_rows=1, intermediate_rows=5, indices=4)
"""Input; gate, up, silu(gate), its product with up, the weighted product; the order."""
EVERYTHING = Kept(hidden_rows=3, intermediate_rows=4, indices=2)
"""Input, output, weighted output; gate, up, silu(gate), its product with up; the token and its choice."""

BACKENDS = {
    "reference": ExpertBackend(ANY_DEVICE, FLOATS, EVERYTHING),
    "cpu": ExpertBackend(("cpu",), FLOATS, GATE_UP),
    "grouped_mm": ExpertBackend(ANY_DEVICE, FP32_BF16, OPERANDS, alignment_bytes=16),
    "bf16_emulated": ExpertBackend(ANY_DEVICE, BF16, GATE_UP, is_emulated=True),
    "triton_fp8": ExpertBackend(("cuda",), FP32_BF16, GATE_UP, is_fp8=True, alignment_bytes=128),
    "fp8_emulated": ExpertBackend(ANY_DEVICE, FP32_BF16, GATE_UP, is_fp8=True, is_emulated=True),
}

AUTO: dict[tuple[str, bool, bool], str] = {
    # device, use_fp8, does the device multiply that precision natively: backend
    ("cpu", False, True): "cpu",
    ("cpu", False, False): "bf16_emulated",
    ("cpu", True, False): "fp8_emulated",
    ("cuda", False, True): "grouped_mm",
    ("cuda", False, False): "bf16_emulated",
    ("cuda", True, True): "triton_fp8",
    ("cuda", True, False): "fp8_emulated",
}
"""What `train.experts: auto` stands for."""

AUTO_UNSUITED = {"grouped_mm": "reference", "triton_fp8": "fp8_emulated"}
"""What it stands for where the first choice can't multiply the model's widths."""


def has_fp8_kernels(weight_quant: bool, activation_quant: bool, mx_blocks: bool) -> bool:
    """Return whether kernels multiply by such a choice of `train.fp8_*`; elsewhere FP8 is emulated.

    No instruction takes FP8 on one side only, and this project's kernels take blocks of 128.
    """
    return weight_quant and activation_quant and not mx_blocks


def auto_of_native_device(device: Device, use_fp8: bool, has_kernels: bool = True) -> str:
    """Return what `auto` stands for on a device that multiplies the precision natively, if any of its kind does."""
    return (has_kernels and AUTO.get((device, use_fp8, True))) or AUTO[device, use_fp8, False]

"""What a training knows between two steps, beside the weights and the optimizer: small, explicit, JSON.

Letters: L layers, E n_routed_experts.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from dsv3.errors import UserError
from dsv3.evaluation.load_balance import max_vio

LOSS_PARTS = {
    "total_loss": "loss",
    "loss": "cross_entropy_loss",
    "mtp_loss": "mtp_loss",
    "sequence_loss": "sequence_loss",
}
"""Name in the history → field of the model's output."""


@dataclass(frozen=True)
class Measured:
    """What one optimizer step measured, the same on every process."""

    losses: dict[str, float]
    """Means over the step's batch, by the keys of `LOSS_PARTS`."""

    grad_norm: float
    """Norm of all gradients before clipping."""

    is_interrupted: bool
    """Whether any process has received a signal to stop."""

    load_LE: Tensor
    """Tokens per router and expert of the step's batch, where the routers are."""

    host_load_LE: Tensor
    """The same, on the CPU."""

    @property
    def is_finite(self) -> bool:
        """Return whether the step may change the weights."""
        return math.isfinite(self.losses["total_loss"]) and math.isfinite(self.grad_norm)


@dataclass
class StepSums:
    """Sums over the steps since the last row of the history."""

    num_steps: int = 0
    elapsed_s: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    load_LE: list[list[int]] = field(default_factory=list)
    max_vio_L: list[float] = field(default_factory=list)
    """Sums of each step's own MaxVio."""

    def add(self, measured: Measured, elapsed_s: float) -> None:
        """Add a step."""
        self.num_steps += 1
        self.elapsed_s += elapsed_s
        for name, value in {**measured.losses, "grad_norm": measured.grad_norm}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        load_LE = measured.host_load_LE
        max_vio_L = max_vio(load_LE)
        if self.load_LE:
            load_LE, max_vio_L = load_LE + torch.tensor(self.load_LE), max_vio_L + torch.tensor(self.max_vio_L)
        self.load_LE, self.max_vio_L = load_LE.tolist(), max_vio_L.tolist()

    def mean(self, name: str) -> float:
        """Return the mean per step."""
        return self.sums[name] / self.num_steps


@dataclass
class TrainState:
    """Where the training stands."""

    step: int = 0
    """Optimizer steps done."""

    train_s: float = 0.0
    """Wall-clock time, of earlier processes too."""

    best_loss: float | None = None
    """Lowest validation loss so far, in nats per token."""

    best_step: int = 0
    validation_loss: float | None = None
    """Latest validation loss, in nats per token."""

    step_sums: StepSums = field(default_factory=StepSums)

    def advance(self, measured: Measured, elapsed_s: float) -> None:
        """Count a step that is done."""
        self.step += 1
        self.train_s += elapsed_s
        self.step_sums.add(measured, elapsed_s)

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values; floats survive exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """Return the state that `to_json` gave; other keys are left alone. `UserError` for values of other kinds."""
        own = {name: values.get(name, "missing") for name in cls.__dataclass_fields__}
        try:
            return TypeAdapter(cls).validate_python(own)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"trainer_state.json: {where}: {first['msg']}; name another checkpoint") from None

"""A training's budget: how many micro-batches each optimizer step takes, and how many came before it.

Schedules are shares of this budget. Where every step is as large as any other, a share of the steps is a share of the
tokens. It is not while the batch ramps up: the report begins with a fifth of the batch and has the whole of it after
3.2 % of the tokens (section 4.2), so its first steps are many and small. A small batch early costs little precision
(gradients point the same way whatever the sample) and buys more steps.

Here the ramp climbs `levels` equal stairs, a fifth, two fifths … of the batch, each for an equal share of the tokens.
A continuous ramp would have batches that processes cannot share evenly.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from dsv3.params.train import TrainParams


@dataclass(frozen=True)
class Budget:
    """What each optimizer step takes of the run's micro-batches."""

    starts: Sequence[int]
    """Micro-batches before step n, over all processes; the last entry, one more than there are steps, is the total."""

    @classmethod
    def even(cls, total_steps: int, micro_batches: int = 1) -> Self:
        """Return the budget of steps that are all equal."""
        return cls(range(0, (total_steps + 1) * micro_batches, micro_batches))

    @property
    def total_steps(self) -> int:
        """Return the number of optimizer steps."""
        return len(self.starts) - 1

    @property
    def total(self) -> int:
        """Return the number of micro-batches of the whole run."""
        return self.starts[-1]

    def share(self, step: int) -> float:
        """Return the share of the budget that is spent before `step`."""
        return self.starts[step] / self.total


def budget_of(train: TrainParams, num_blocks_per_epoch: int) -> Budget:
    """Return the budget of a training: exactly `max_steps` steps, or the nearest to `num_train_epochs`."""
    size = train.gradient_accumulation_steps
    sequences_per_step = train.per_device_train_batch_size * size
    steps = max(1, round(train.num_train_epochs * num_blocks_per_epoch / sequences_per_step))
    if train.batch_ramp_levels == 1:
        return Budget.even(train.max_steps if train.max_steps > 0 else steps, size)
    total = steps * size
    if train.max_steps > 0:
        totals = range(train.max_steps * size + 1)
        total = bisect_left(totals, train.max_steps, key=lambda total: len(_starts(total, train)) - 1)
    return Budget(_starts(total, train))


def _starts(total: int, train: TrainParams) -> list[int]:
    """Return the micro-batches before each step of a ramped run that takes `total`, at most a step's more."""
    size, levels = train.gradient_accumulation_steps, train.batch_ramp_levels
    ramp, starts = train.batch_ramp_ratio * total, [0]
    while starts[-1] < min(ramp, total):
        level = min(levels, 1 + int((levels - 1) * starts[-1] / ramp))
        starts.append(starts[-1] + level * size // levels)
    return [*starts, *range(starts[-1] + size, total + size, size)] if starts[-1] < total else starts

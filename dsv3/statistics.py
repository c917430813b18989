"""What a few seeds allow to say: their mean, and how far the true one may lie from it.

The mean of n values is uncertain by t · s / √n, where s is their standard deviation and t Student's, which for three
seeds is 4.3: with so few runs only a difference of two and a half standard deviations counts as one.
"""

import statistics
from dataclasses import dataclass

STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles for 1, 2, 3 ... degrees of freedom; the last one serves beyond, where it is too strict."""


@dataclass(frozen=True)
class Sample:
    """One number per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return the mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Return the standard deviation of a value, None for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def half_interval(self) -> float | None:
        """Return how far the true mean may lie from `mean`, at 95 %; None for a single value."""
        if self.deviation is None:
            return None
        count = len(self.values)
        return STUDENT_T[min(count - 1, len(STUDENT_T)) - 1] * self.deviation / count**0.5

    @property
    def is_established(self) -> bool:
        """Return whether zero lies outside the interval."""
        return self.half_interval is not None and abs(self.mean) > self.half_interval

"""What a few seeds allow to say: differences of runs that share a seed, and when such a difference is more than noise.

A seed decides the first weights and the order of the text, for every variant alike, so runs are compared seed by seed.
The mean of n such differences is uncertain by t · s / √n, where s is their standard deviation and t Student's, which
for three seeds is 4.3: with so few runs only a difference of two and a half standard deviations counts as one.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.studies.results import Curve, Result

Value = Callable[[Result], float]

STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles for 1, 2, 3 ... degrees of freedom; the last one serves beyond, where it is too strict."""

SMOOTHING = 0.9
"""Weight of the past in the smoothed training loss; the report smooths its curves so."""


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


def of_variant(results: Sequence[Result], variant: str) -> list[Result]:
    """Return the variant's results."""
    return [result for result in results if result.variant == variant]


def pairs(results: Sequence[Result], variant: str, baseline: str) -> list[tuple[Result, Result]]:
    """Return (variant's run, baseline's run) of each seed that has both."""
    others = {result.seed: result for result in of_variant(results, baseline)}
    return [(result, others[result.seed]) for result in of_variant(results, variant) if result.seed in others]


def differences(results: Sequence[Result], variant: str, baseline: str, value: Value) -> Sample:
    """Return the variant's value minus the baseline's, by seed."""
    return Sample(tuple(value(own) - value(other) for own, other in pairs(results, variant, baseline)))


def ratios(results: Sequence[Result], variant: str, baseline: str, value: Value) -> Sample:
    """Return the variant's value divided by the baseline's, by seed."""
    return Sample(tuple(value(own) / value(other) for own, other in pairs(results, variant, baseline)))


def mean_curve(found: Sequence[Curve]) -> Curve:
    """Return the mean of the curves at the steps that all of them have."""
    steps = sorted(set.intersection(*(set(curve) for curve in found)))
    return {step: sum(curve[step] for curve in found) / len(found) for step in steps}


def relative_gap(own: Result, other: Result) -> Curve:
    """Return the difference of the two smoothed training losses in percent of the second."""
    ours, theirs = smoothed(own.losses), smoothed(other.losses)
    return {step: 100 * (ours[step] / theirs[step] - 1) for step in ours if step in theirs}


def smoothed(curve: Curve) -> Curve:
    """Return the exponential moving average of the curve's points, without a bias towards its beginning."""
    total = weight = 0.0
    found: dict[int, float] = {}
    for step, value in curve.items():
        total, weight = SMOOTHING * total + (1 - SMOOTHING) * value, SMOOTHING * weight + (1 - SMOOTHING)
        found[step] = total / weight
    return found

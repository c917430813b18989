"""What a few seeds allow to say: differences of runs that share a seed, and when such a difference is more than noise.

A seed decides the first weights and the order of the text, for every variant alike, so runs are compared seed by seed.
"""

from collections.abc import Callable, Sequence

from benchmarks.studies.results import Curve, Result
from dsv3.statistics import Sample

Value = Callable[[Result], float]

SMOOTHING = 0.9
"""Weight of the past in the smoothed training loss; the report smooths its curves so."""


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

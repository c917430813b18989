"""How the loss falls with parameters and tokens: a law fitted to a grid of trainings.

Hoffmann et al. (2022, arXiv:2203.15556, approach 3) write the loss of a model with N parameters after D tokens as

    L(N, D) = E + A / N^α + B / D^β

A small corpus is read several times. Muennighoff et al. (2023, arXiv:2305.16264) let a token that was read before count
for less: with U tokens in the corpus, D above is replaced by

    D'(D) = U + U · R · (1 - exp(-(D / U - 1) / R))        for D > U,

so R is the number of repetitions after which another one brings little. They discount parameters likewise; a grid as
small as ours could not tell the two apart, so N is taken as it is. N counts the parameters that a token multiplies
with: active ones without the embedding, of which it reads one row.

For given exponents and R the law is linear in E, A and B. So a grid over the three, at each point of which the others
are solved for exactly, gives a start per R, without guessing. From each of them all six numbers descend together
(Levenberg and Marquardt's steps): E, β and R trade for one another along a narrow oblique valley, on which a finer and
finer grid stops early, at an R far from the best. We give up the papers' Huber loss: a run that failed would be seen in
the table. Intervals come from drawing the runs again with replacement; they cover the noise of runs,
not the law's being wrong, which the runs of most compute, left out of the fit and predicted, show.

Letters: n runs, G points of the grid or descents from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from benchmarks.studies.definition import Study
from benchmarks.studies.report import conditions, plus_minus, table
from benchmarks.studies.results import Result
from dsv3.statistics import Sample

Array = NDArray[np.float64]

EXPONENTS = (0.05, 2.0)
"""Least and largest exponent of the search."""
REPETITIONS = (0.5, 200.0)
"""Least and largest R of the search; the grid is geometric."""
NUM_PER_AXIS = 12
"""Points of the grid per axis, and so descents."""
NUM_STEPS = 200
"""Of a descent; more than any needs that converges."""
LEAST_COEFFICIENT = 1e-9
"""E, A and B descend by their logarithms, so this is their zero."""
NUM_RESAMPLES = 200
FLOPS_PER_PARAMETER = 6
"""Of a token in training, forward and backward."""
NUM_EPOCHS = (1, 5, 20)
"""Lengths of the baseline's training whose compute the page spends anew."""


@dataclass(frozen=True)
class Runs:
    """What the law is fitted to; each (n)."""

    parameters: Array
    tokens: Array
    unique_tokens: Array
    loss: Array
    """Held-out, nats/char."""

    def take(self, chosen: NDArray[np.bool_]) -> "Runs":
        """Return the chosen runs."""
        return Runs(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True)
class Law:
    """The law's six numbers; A and B for N in millions and D in millions of tokens."""

    floor: float
    """E, nats/char."""
    of_parameters: float
    """A."""
    of_tokens: float
    """B."""
    alpha: float
    beta: float
    repetitions: float
    """R."""

    def loss(self, parameters: Array, tokens: Array, unique_tokens: Array) -> Array:
        """Return the predicted loss, nats/char."""
        counted = distinct(tokens, unique_tokens, np.float64(self.repetitions))
        falls = self.of_parameters * (parameters / 1e6) ** -self.alpha + self.of_tokens * (counted / 1e6) ** -self.beta
        return self.floor + falls


def can_fit(runs: Runs) -> bool:
    """Return whether there are more sizes and lengths than the law has numbers, and several of each."""
    cells = set(zip(runs.parameters, runs.tokens, strict=True))
    return len(cells) > len(fields(Law)) and len(set(runs.parameters)) > 1 and len(set(runs.tokens)) > 1


def runs_of(results: Sequence[Result]) -> Runs:
    """Return the numbers of the results that the law is about."""
    columns = (
        [float(r.num_active - r.num_embedding) for r in results],
        [float(r.num_tokens) for r in results],
        [r.num_tokens / r.num_epochs for r in results],
        [r.nats_per_char for r in results],
    )
    return Runs(*map(np.array, columns))


def distinct(tokens: Array, unique_tokens: Array, repetitions: Array | np.float64) -> Array:
    """Return how many tokens of a text without end would teach as much: D', broadcast over the arguments."""
    again = np.maximum(tokens / unique_tokens - 1, 0)
    return np.minimum(tokens, unique_tokens) + unique_tokens * repetitions * -np.expm1(-again / repetitions)


def fit(runs: Runs, counts: Array | None = None) -> Law:
    """Return the law of least squared error; `counts` (n) says how often each run counts, once by default."""
    weights = np.ones_like(runs.loss) if counts is None else counts
    axes = [np.geomspace(*bounds, NUM_PER_AXIS) for bounds in (REPETITIONS, EXPONENTS, EXPONENTS)]
    repetitions, alpha, beta = (column.reshape(NUM_PER_AXIS, -1) for column in np.meshgrid(*axes, indexing="ij"))
    points = np.stack([alpha, beta, repetitions], -1)
    coefficients, errors = solve(runs, points.reshape(-1, 3), weights)
    least = errors.reshape(NUM_PER_AXIS, -1).argmin(-1)  # of each R
    rows = np.arange(NUM_PER_AXIS)
    starts = np.concatenate([coefficients.reshape(*points.shape)[rows, least], points[rows, least]], -1)
    laws, errors = descend(runs, starts, weights)
    return Law(*map(float, laws[errors.argmin()]))


def descend(runs: Runs, starts: Array, weights: Array) -> tuple[Array, Array]:
    """Return the six numbers (G, 6) to which squared errors (G) fall from `starts` (G, 6), within the bounds."""
    bounds = [(LEAST_COEFFICIENT, np.inf)] * 3 + [EXPONENTS, EXPONENTS, REPETITIONS]
    low, high = np.log(np.array(bounds)).T
    place = np.clip(np.log(np.maximum(starts, LEAST_COEFFICIENT)), low, high)
    damping = np.full(len(place), 1e-2)
    residual, slopes = linearized(runs, place)
    error = (weights * residual**2).sum(-1)
    for _ in range(NUM_STEPS):
        gradient = np.einsum("gnp,n,gn->gp", slopes, weights, residual)
        is_held = ((place <= low) & (gradient > 0)) | ((place >= high) & (gradient < 0))
        free = np.where(is_held, 0.0, 1.0)
        normal = np.einsum("gnp,n,gnq->gpq", slopes, weights, slopes) * free[:, :, None] * free[:, None, :]
        diagonal = np.einsum("gpp->gp", normal)
        diagonal += damping[:, None] * diagonal + 1e-15 + is_held  # in place: einsum gives a view
        step = np.linalg.solve(normal, (-gradient * free)[..., None])[..., 0]
        tried = np.clip(place + np.clip(step, -1, 1), low, high)
        tried_residual, tried_slopes = linearized(runs, tried)
        tried_error = (weights * tried_residual**2).sum(-1)
        is_better = tried_error < error
        place, error = np.where(is_better[:, None], tried, place), np.where(is_better, tried_error, error)
        residual = np.where(is_better[:, None], tried_residual, residual)
        slopes = np.where(is_better[:, None, None], tried_slopes, slopes)
        damping = np.clip(damping * np.where(is_better, 0.3, 4.0), 1e-12, 1e12)
    return np.where(place <= np.log(LEAST_COEFFICIENT), 0.0, np.exp(place)), error


def linearized(runs: Runs, place: Array) -> tuple[Array, Array]:
    """Return predicted minus found losses (G, n) at the logarithms `place` (G, 6) of the law's numbers, and slopes."""
    floor, of_parameters, of_tokens, alpha, beta, repetitions = np.exp(place).T[..., None]
    millions, counted = runs.parameters / 1e6, distinct(runs.tokens, runs.unique_tokens, repetitions) / 1e6
    by_size, by_length = of_parameters * millions**-alpha, of_tokens * counted**-beta
    again = np.maximum(runs.tokens / runs.unique_tokens - 1, 0) / repetitions
    counted_slope = runs.unique_tokens / 1e6 * repetitions * (-np.expm1(-again) - again * np.exp(-again))
    slopes = (
        floor + np.zeros_like(by_size),
        by_size,
        by_length,
        -by_size * alpha * np.log(millions),
        -by_length * beta * np.log(counted),
        -by_length * beta / counted * counted_slope,
    )
    return floor + by_size + by_length - runs.loss, np.stack(slopes, -1)


def solve(runs: Runs, points: Array, weights: Array) -> tuple[Array, Array]:
    """Return E, A and B (G, 3) and the weighted squared error (G).

    `points` (G, 3) are exponents and R. Where one of E, A and B would be negative, they are the mean loss, 0 and 0.
    """
    alpha, beta, repetitions = (points[:, i, None] for i in range(3))
    of_tokens = (distinct(runs.tokens, runs.unique_tokens, repetitions) / 1e6) ** -beta
    features = np.stack([np.ones_like(of_tokens), (runs.parameters / 1e6) ** -alpha, of_tokens], -1)  # (G, n, 3)
    weighted = features * np.sqrt(weights)[None, :, None]
    solved = np.linalg.pinv(weighted) @ (np.sqrt(weights) * runs.loss)  # pinv: exponents can make two columns alike
    constant = np.array([np.average(runs.loss, weights=weights), 0, 0])
    solved = np.where((solved < 0).any(-1, keepdims=True), constant, solved)
    residual = runs.loss - (features @ solved[..., None])[..., 0]
    return solved, (weights * residual**2).sum(-1)


def resampled(runs: Runs, seed: int = 0) -> list[Law]:
    """Return the laws of as many runs, drawn from `runs` with replacement, `NUM_RESAMPLES` times."""
    draw, num_runs = np.random.default_rng(seed), len(runs.loss)
    counts = draw.multinomial(num_runs, [1 / num_runs] * num_runs, NUM_RESAMPLES).astype(np.float64)
    return [fit(runs, count) for count in counts]


def cheapest(law: Law, flops: float, unique_tokens: float) -> tuple[float, float]:
    """Return (parameters, tokens) of the lowest predicted loss for a training of that many FLOPs, 6 N D."""
    parameters = np.geomspace(1e4, 1e9, 5001)
    tokens = flops / FLOPS_PER_PARAMETER / parameters
    best = int(np.argmin(law.loss(parameters, tokens, np.full_like(tokens, unique_tokens))))
    return float(parameters[best]), float(tokens[best])


def section(name: str, study: Study, results: Sequence[Result], how: str, figure: str) -> str:
    """Return the generated part of the study's page."""
    runs = runs_of(results)
    reading = "Held-out nats/char, ± the standard deviation over the seeds; N: parameters that a token multiplies with."
    parts = [f"{conditions(study, results, how)}\n\n{reading}", losses(results), f"![{name}]({figure})"]
    if can_fit(runs):
        law, laws = fit(runs), resampled(runs)
        parts += [numbers(law, laws), "\n".join(f"- {line}" for line in sentences(study, results, law, laws))]
    else:
        parts.append("A law of six numbers wants more than six sizes and lengths; it was not fitted.")
    return "\n\n".join(parts) + "\n"


def losses(results: Sequence[Result]) -> str:
    """Return the table of held-out losses: a row per size, a column per number of epochs."""
    epochs = sorted({round(r.num_epochs, 1) for r in results})
    rows = []
    for size in sorted({r.num_active - r.num_embedding for r in results}):
        own = [r for r in results if r.num_active - r.num_embedding == size]
        cells = [[r.nats_per_char for r in own if round(r.num_epochs, 1) == epoch] for epoch in epochs]
        rows.append(
            [f"{size:,}", f"{own[0].num_parameters:,}"]
            + [plus_minus(Sample(tuple(cell)), 4) if cell else "" for cell in cells]
        )
    return table(["N", "parameters", *(f"epochs: {epoch:g}" for epoch in epochs)], rows)


def interval(values: Sequence[float]) -> str:
    """Return the middle 95 % of the values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return f"{low:.3g} to {high:.3g}"


def numbers(law: Law, laws: Sequence[Law]) -> str:
    """Return the table of the law's numbers with their intervals."""
    meanings = {
        "floor": "E, nats/char",
        "of_parameters": "A, nats/char at a million parameters",
        "of_tokens": "B, nats/char at a million tokens",
        "alpha": "α, exponent of the parameters",
        "beta": "β, exponent of the tokens",
        "repetitions": "R, repetitions",
    }
    rows = [
        [meaning, f"{getattr(law, field):.3g}", interval([getattr(one, field) for one in laws])]
        for field, meaning in meanings.items()
    ]
    return table(["L = E + A / N^α + B / D'^β", "fitted", "95 % interval"], rows)


def sentences(study: Study, results: Sequence[Result], law: Law, laws: Sequence[Law]) -> list[str]:
    """Return what the law says, and how far it can be trusted."""
    return [*trust(runs_of(results), law), *undetermined(laws), *best_sizes(study, results, law, laws)]


def trust(runs: Runs, law: Law) -> list[str]:
    """Return how far the law lies from the runs it was fitted to, and from those of most compute without them."""

    def missed(part: Runs, law: Law) -> Array:
        return part.loss - law.loss(part.parameters, part.tokens, part.unique_tokens)

    compute = runs.parameters * runs.tokens
    dearest = compute == compute.max()
    error = float(np.sqrt(np.mean(missed(runs, law) ** 2)))
    beyond = float(np.mean(missed(runs.take(dearest), fit(runs.take(~dearest)))))
    return [
        f"The law misses a run by {error:.4f} nats/char (root mean square over {len(runs.loss)} runs).",
        f"Fitted without what took most compute ({int(dearest.sum())} of the runs), it predicts that {abs(beyond):.4f} "
        f"nats/char too {'low' if beyond > 0 else 'high'}.",
    ]


def undetermined(laws: Sequence[Law]) -> list[str]:
    """Return the sentence that names what the drawn runs put at the bound of the search, if there is any."""
    searched = {"α": ("alpha", EXPONENTS), "β": ("beta", EXPONENTS), "R": ("repetitions", REPETITIONS)}
    at_bound = {
        name: np.mean([not 1.01 * low < getattr(one, field) < high / 1.01 for one in laws])
        for name, (field, (low, high)) in searched.items()
    }
    names = [name for name, share in at_bound.items() if share > 1 / 40]
    if not names:
        return []
    return [
        f"Not determined by these runs: {', '.join(names)}. Of the drawn sets of runs more than one in forty put it at "
        f"the bound of the search ({EXPONENTS[0]:g} to {EXPONENTS[1]:g} for exponents, {REPETITIONS[0]:g} to "
        f"{REPETITIONS[1]:g} for R)."
    ]


def best_sizes(study: Study, results: Sequence[Result], law: Law, laws: Sequence[Law]) -> list[str]:
    """Return which size the law finds best for the compute of the baseline's model, read once and more often."""
    base = next((r for r in results if r.variant == study.baseline), None)
    if base is None:
        return []
    size, unique = base.num_active - base.num_embedding, base.num_tokens / base.num_epochs
    longest, lines = max(r.num_epochs for r in results), list[str]()
    for epochs in NUM_EPOCHS:
        flops = FLOPS_PER_PARAMETER * size * unique * epochs
        best, tokens = cheapest(law, flops, unique)
        sizes = interval([cheapest(one, flops, unique)[0] / 1e6 for one in laws])
        doubt = "; no run read the text so often" if tokens / unique > longest else ""
        lines.append(
            f"With the compute of `{study.baseline}`'s model (N = {size / 1e6:.3g} million) after {epochs} epoch(s), "
            f"6 N D = {flops:.2g} FLOPs, the law is lowest at N = {best / 1e6:.3g} million ({sizes}), read for "
            f"{tokens / unique:.2g} epochs{doubt}."
        )
    return lines

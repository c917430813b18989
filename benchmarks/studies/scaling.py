"""How the loss falls with parameters and tokens: a law fitted to a grid of trainings.

Hoffmann et al. (2022, arXiv:2203.15556, approach 3) write the loss of a model with N parameters after D tokens as

    L(N, D) = E + A / N^α + B / D^β

A small corpus is read several times. Muennighoff et al. (2023, arXiv:2305.16264) let a token that was read before count
for less: with U tokens in the corpus, D above is replaced by

    D'(D) = U + U · R · (1 - exp(-(D / U - 1) / R))        for D > U,

so R is the number of repetitions after which another one brings little. They discount parameters likewise; a grid as
small as ours could not tell the two apart, so N is taken as it is. N counts the parameters that a token multiplies
with: active ones without the embedding, of which it reads one row.

For given exponents and R the law is linear in E, A and B. So the fit is a search over three numbers, each step of which
solves a least-squares problem of three unknowns exactly: no start has to be guessed, and nothing gets stuck. The
alternative, descent over all six as in the papers, needs many starts. We give up their Huber loss: a run that failed
would be seen in the table. Intervals come from drawing the runs again with replacement; they cover the noise of runs,
not the law's being wrong, which the runs of most compute, left out of the fit and predicted, show.

Letters: n runs, G points of the search.
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
"""Least and largest R of the search; the grids are geometric."""
NUM_PER_AXIS, NUM_ROUNDS = 12, 7
"""Points per axis in each round of the search; each round's axes reach from neighbour to neighbour of the best."""
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
    bounds = [np.log(EXPONENTS), np.log(EXPONENTS), np.log(REPETITIONS)]
    limits, best = list(bounds), Law(0, 0, 0, 1, 1, 1)
    for _ in range(NUM_ROUNDS):
        axes = [np.linspace(low, high, NUM_PER_AXIS) for low, high in limits]
        points = np.exp(np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3))
        coefficients, errors = solve(runs, points, weights)
        least = int(np.argmin(errors))
        best = Law(*map(float, (*coefficients[least], *points[least])))
        steps = [axis[1] - axis[0] for axis in axes]
        limits = [
            (max(low, center - step), min(high, center + step))
            for (low, high), center, step in zip(bounds, np.log(points[least]), steps, strict=True)
        ]
    return best


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

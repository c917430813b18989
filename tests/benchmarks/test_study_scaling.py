"""The law's fit, on losses that a known law made."""

from dataclasses import astuple, replace

import numpy as np
import pytest

from benchmarks.studies.definition import Study, Variant
from benchmarks.studies.figures import figure
from benchmarks.studies.results import Result
from benchmarks.studies.scaling import (
    FLOPS_PER_PARAMETER,
    Law,
    Runs,
    cheapest,
    distinct,
    fit,
    linearized,
    losses,
    resampled,
    runs_of,
    section,
    solve,
)
from tests.benchmarks.studies_made_up import RESULT

TRUE = Law(floor=1.1, of_parameters=0.15, of_tokens=0.3, alpha=0.4, beta=0.5, repetitions=8.0)
UNIQUE = 300_000
EMBEDDING = 1_000_000
SIZES, EPOCHS, SEEDS = (200_000, 500_000, 2_000_000), (0.5, 1.0, 2.0, 4.0), (1, 2, 3)
STUDY = Study(
    document="page.md",
    figure="law",
    baseline="500000-1.0",
    seeds=list(SEEDS),
    variants={f"{n}-{e}": Variant(part="Size", change="it is another") for n in SIZES for e in EPOCHS},
)


def grid(noise: float = 0.0, law: Law = TRUE) -> list[Result]:
    """Return a run per size, number of epochs and seed, with the law's loss and some noise."""
    draw, found = np.random.default_rng(0), []
    for size in SIZES:
        for epochs in EPOCHS:
            tokens = np.array([epochs * UNIQUE])
            exact = law.loss(np.array([float(size)]), tokens, np.full_like(tokens, UNIQUE)).item()
            for seed in SEEDS:
                run = replace(RESULT, name=f"study-{size}-{epochs}-{seed}", variant=f"{size}-{epochs}", seed=seed)
                score = exact + noise * draw.standard_normal()
                counts = {"num_active": size + EMBEDDING, "num_embedding": EMBEDDING, "num_tokens": int(tokens.item())}
                found.append(replace(run, nats_per_char=score, num_epochs=epochs, **counts))
    return found


@pytest.mark.parametrize("repetitions", [2.0, 8.0, 20.0, 60.0, 150.0])
@pytest.mark.parametrize("exponents", [(0.4, 0.5), (0.85, 0.17), (0.2, 0.3)])
def test_the_law_that_made_the_losses_is_found_again(repetitions, exponents):
    """From anywhere: E, beta and R trade for one another along a narrow valley."""
    alpha, beta = exponents
    law = replace(TRUE, floor=0.8, alpha=alpha, beta=beta, repetitions=repetitions)
    assert astuple(fit(runs_of(grid(law=law)))) == pytest.approx(astuple(law), rel=1e-3)


def test_no_grid_point_beside_the_fit_has_a_lower_error():
    """Of noisy runs the best law is not known; the whole grid, finer than the search's, is asked."""
    runs = runs_of(grid(noise=0.004, law=replace(TRUE, floor=0.8, alpha=0.85, beta=0.17, repetitions=60.0)))
    law, weights = fit(runs), np.ones_like(runs.loss)
    found = ((law.loss(runs.parameters, runs.tokens, runs.unique_tokens) - runs.loss) ** 2).sum()
    axes = [np.geomspace(0.05, 2, 60), np.geomspace(0.05, 2, 60), np.geomspace(0.5, 200, 40)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    assert found <= solve(runs, points, weights)[1].min() * (1 + 1e-9)


def test_slopes_are_those_of_the_errors():
    runs, place = runs_of(grid()), np.log(np.array([astuple(TRUE)]))
    slopes = linearized(runs, place)[1][0]
    for number in range(6):
        ahead, behind = (place + side * 1e-6 * np.eye(6)[number] for side in (1, -1))
        expected = (linearized(runs, ahead)[0] - linearized(runs, behind)[0])[0] / 2e-6
        assert slopes[:, number] == pytest.approx(expected, abs=1e-8)


def test_a_run_that_counts_twice_is_a_run_that_is_there_twice():
    runs = runs_of(grid(noise=0.01))
    twice = Runs(*(np.concatenate([column, column[:9]]) for column in astuple(runs)))
    counts = np.ones(len(runs.loss))
    counts[:9] = 2
    assert astuple(fit(runs, counts)) == pytest.approx(astuple(fit(twice)), rel=1e-6)


def test_the_interval_of_drawn_runs_holds_the_truth_and_grows_with_the_noise(monkeypatch):
    monkeypatch.setattr("benchmarks.studies.scaling.NUM_RESAMPLES", 40)
    widths = []
    for noise in (0.001, 0.004):
        alphas = [law.alpha for law in resampled(runs_of(grid(noise)))]
        assert min(alphas) < TRUE.alpha < max(alphas)
        widths.append(np.std(alphas))
    assert widths[0] < widths[1] / 2


def test_no_number_of_the_law_is_negative_though_the_loss_would_rather():
    rising = runs_of([replace(run, nats_per_char=1.0 + run.num_tokens / 1e6) for run in grid()])
    law = fit(rising)
    assert min(astuple(law)) >= 0
    assert law.floor == pytest.approx(rising.loss.mean()), "nothing falls, so the law is a constant"


def test_tokens_read_again_count_for_less_and_the_first_reading_in_full():
    tokens, unique = np.array([0.5, 1.0, 2.0, 1e9]), np.ones(4)
    counted = distinct(tokens, unique, np.float64(4.0))
    assert counted[:2].tolist() == [0.5, 1.0]
    assert counted[2] == pytest.approx(1 + 4 * (1 - np.exp(-0.25)))
    assert counted[3] == pytest.approx(5.0), "however often the text is read, it is worth 1 + R readings"


def test_the_best_size_has_the_law_s_slopes_in_balance():
    endless = replace(TRUE, repetitions=1e9)
    flops = 1e14
    size, tokens = cheapest(endless, flops, unique_tokens=1e12)
    assert FLOPS_PER_PARAMETER * size * tokens == pytest.approx(flops)
    falls = (
        TRUE.alpha * TRUE.of_parameters * (size / 1e6) ** -TRUE.alpha,
        TRUE.beta * TRUE.of_tokens * (tokens / 1e6) ** -TRUE.beta,
    )
    assert falls[0] == pytest.approx(falls[1], rel=2e-3)  # neighbouring sizes of the search differ by 0.2 %


def test_a_cell_of_the_table_is_the_mean_of_its_seeds_and_a_missing_one_is_empty():
    first, *rest = [run for run in grid() if run.num_epochs == 1.0]
    runs = [replace(first, nats_per_char=1.5), replace(first, nats_per_char=1.7, seed=2)]
    header, _, *rows = losses([*runs, replace(rest[-1], num_epochs=2.0)]).splitlines()
    assert header == "| N | parameters | epochs: 1 | epochs: 2 |"
    assert rows[0] == "| 200,000 | 1,234 | 1.6000 ± 0.1414 |  |"
    assert rows[1].startswith("| 2,000,000 | 1,234 |  | ")


def test_the_page_says_how_far_the_law_can_be_trusted(monkeypatch):
    monkeypatch.setattr("benchmarks.studies.scaling.NUM_RESAMPLES", 20)
    exact = section("study", STUDY, grid(), "on paper", "figure.png")
    assert "| α, exponent of the parameters | 0.4 | 0.4 to 0.4 |" in exact
    assert "misses a run by 0.0000 nats/char" in exact
    assert "Fitted without what took most compute (3 of the runs), it predicts that 0.0000 nats/char too" in exact
    assert "epochs; no run read the text so often." in exact.splitlines()[-1], "20 epochs, where runs had 4"
    assert "Not determined" not in exact
    fresh = section("study", STUDY, grid(law=replace(TRUE, repetitions=1e6)), "on paper", "figure.png")
    assert "Not determined by these runs: R." in fresh, "tokens that never grow old put R at the search's bound"


def test_most_compute_is_left_out_of_the_fit_that_predicts_it(monkeypatch):
    monkeypatch.setattr("benchmarks.studies.scaling.NUM_RESAMPLES", 4)
    runs = grid()
    dearest = max(run.num_tokens * (run.num_active - run.num_embedding) for run in runs)
    worse = [
        replace(run, nats_per_char=run.nats_per_char + 0.02)
        if run.num_tokens * (run.num_active - run.num_embedding) == dearest
        else run
        for run in runs
    ]
    assert "0.0200 nats/char too low" in section("study", STUDY, worse, "on paper", "figure.png")


def test_too_few_cells_are_shown_without_a_law():
    few = [run for run in grid() if run.num_epochs == 1.0]
    assert "was not fitted" in section("study", STUDY, few, "on paper", "figure.png")
    assert len(figure(STUDY, few).axes) == 1


def test_the_figure_has_a_line_of_the_law_for_each_size():
    axes = figure(STUDY, grid()).axes[0]
    lines = [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 100]
    assert len(lines) == len(SIZES)

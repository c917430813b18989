from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dsv3.params.train import TrainParams
from dsv3.training.budget import Budget, budget_of
from dsv3.training.schedule import bias_update_rate, learning_rate, mtp_loss_weight
from tests import committed

DEFAULTS = committed.DEFAULTS.train.model_dump()


def params(**values) -> TrainParams:
    return TrainParams(**{**DEFAULTS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 5, **values})


def sizes(budget: Budget) -> list[int]:
    return [end - start for start, end in pairwise(budget.starts)]


def test_without_a_ramp_every_step_takes_the_whole_batch():
    budget = budget_of(params(num_train_epochs=2.0), 100)
    assert sizes(budget) == [5] * 40
    assert budget.share(10) == 0.25


def test_the_ramp_climbs_equal_stairs_for_equal_shares_of_the_tokens():
    budget = budget_of(params(batch_ramp_levels=5, batch_ramp_ratio=0.5, num_train_epochs=10.0), 240)
    # 2400 micro-batches, of which 1200 on four stairs: 300 in ones, 300 in twos, 300 in threes, 300 in fours.
    assert sizes(budget) == [1] * 300 + [2] * 150 + [3] * 100 + [4] * 75 + [5] * 240
    assert budget.total == 2400


def test_the_reports_ramp_goes_from_a_fifth_to_all_of_the_batch_in_3_2_percent_of_the_tokens():
    """3072 to 15360 sequences over the first 469 billion of 14.8 trillion tokens (section 4.2)."""
    report = params(batch_ramp_levels=5, batch_ramp_ratio=0.469 / 14.8, per_device_train_batch_size=3072)
    budget = budget_of(report, 241_000_000)  # sequences of 4096 tokens, four epochs of 3.7 trillion
    first_whole = sizes(budget).index(5)
    assert sizes(budget)[0] * 3072 == 3072
    assert set(sizes(budget)[first_whole:-1]) == {5}
    assert budget.share(first_whole) == pytest.approx(0.0317, abs=2e-4)


def test_schedules_are_shares_of_the_tokens_where_the_batch_ramps_up():
    ramped = params(
        batch_ramp_levels=5, batch_ramp_ratio=0.5, num_train_epochs=10.0, warmup_ratio=0.0, learning_rate=1.0,
        weight_decay=0.0, lr_scheduler_type="linear", min_lr_ratio=0.0, bias_update_rate=1.0, bias_freeze_ratio=0.25,
    )  # fmt: skip
    budget = budget_of(ramped, 240)
    half = budget.starts.index(1200)
    assert half > budget.total_steps / 2
    assert learning_rate(half, ramped, budget) == pytest.approx(0.5)
    frozen = [step for step in range(budget.total_steps) if bias_update_rate(step, ramped, budget) == 0]
    assert budget.starts[frozen[0]] == 1800
    falls = next(step for step in range(budget.total_steps) if mtp_loss_weight(step, ramped, budget) == 0.1)
    assert budget.share(falls - 1) < 10 / 14.8 <= budget.share(falls)


@given(st.integers(1, 60), st.sampled_from([1, 2, 5, 10]), st.floats(0.0, 0.99), st.integers(1, 400))
def test_any_ramp_never_falls_and_hits_the_asked_number_of_steps(units, levels, ratio, max_steps):
    drawn = {"gradient_accumulation_steps": units * levels, "batch_ramp_levels": levels, "batch_ramp_ratio": ratio}
    budget = budget_of(params(max_steps=max_steps, **drawn), 1)
    assert budget.total_steps == max_steps
    assert all(earlier <= later for earlier, later in pairwise(sizes(budget)))
    assert all(size % units == 0 and units <= size <= units * levels for size in sizes(budget))


@given(st.integers(1, 20), st.floats(0.0, 0.99), st.integers(1, 5000))
def test_any_ramp_takes_the_tokens_of_its_epochs_and_less_than_a_step_more(units, ratio, blocks):
    drawn = {"gradient_accumulation_steps": units * 5, "batch_ramp_levels": 5, "batch_ramp_ratio": ratio}
    plain = budget_of(params(num_train_epochs=3.0, gradient_accumulation_steps=units * 5), blocks)
    ramped = budget_of(params(num_train_epochs=3.0, **drawn), blocks)
    assert plain.total <= ramped.total < plain.total + units * 5


def test_stairs_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValidationError, match="batch_ramp_levels is 2; must divide gradient_accumulation_steps"):
        params(batch_ramp_levels=2)

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.params.train import TrainParams
from dsv3.training.budget import Budget
from dsv3.training.schedule import (
    COSINE_UNTIL,
    bias_update_rate,
    ema_decay,
    learning_rate,
    mtp_loss_weight,
    warmup_steps,
)
from tests import committed

DEFAULTS = committed.DEFAULTS.train.model_dump()
SCHEDULERS = ["deepseek_v3", "cosine", "linear", "constant"]


def params(**values) -> TrainParams:
    return TrainParams(
        **{**DEFAULTS, "learning_rate": 1.0, "weight_decay": 0.0, "warmup_ratio": 0.1, "min_lr_ratio": 0.25, **values}
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_warm_up_rises_in_equal_steps_and_ends_at_the_peak(scheduler):
    given_params = params(lr_scheduler_type=scheduler)
    rates = [learning_rate(step, given_params, Budget.even(1000)) for step in range(101)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[49] == pytest.approx(0.5)
    assert rates[99] == rates[100] == 1.0


@pytest.mark.parametrize(("scheduler", "end"), [("cosine", 0.25), ("linear", 0.25), ("constant", 1.0)])
def test_the_decay_ends_at_its_named_share_of_the_peak(scheduler, end):
    assert learning_rate(1000, params(lr_scheduler_type=scheduler), Budget.even(1000)) == pytest.approx(end)


def test_half_way_between_warm_up_and_end_linear_and_cosine_meet():
    at_half = [learning_rate(550, params(lr_scheduler_type=name), Budget.even(1000)) for name in ("linear", "cosine")]
    assert at_half == pytest.approx([0.625, 0.625])


def test_the_reports_schedule_has_its_values_at_its_tokens():
    """Tokens in billions of 14.8 trillion, rates in units of 2.2e-4 (report, section 4.2)."""
    report = params(lr_scheduler_type="deepseek_v3", warmup_ratio=0.0)
    expected = {0: 1.0, 5000: 1.0, 9999: 1.0, 12150: 0.55, 14300: 0.1, 14632: 0.1, 14634: 7.3 / 220, 14799: 7.3 / 220}
    for billions, ratio in expected.items():
        assert learning_rate(billions, report, Budget.even(14800)) == pytest.approx(ratio, abs=1e-6), billions


def test_the_bias_stands_still_for_the_last_share_of_the_budget():
    report = params(bias_update_rate=0.001, bias_freeze_ratio=0.034)
    rates = [bias_update_rate(step, report, Budget.even(1000)) for step in range(1000)]
    assert rates == [0.001] * 966 + [0.0] * 34
    assert pytest.approx(1 - 0.034, abs=3e-4) == COSINE_UNTIL  # the decay's end and the freeze are the same moment


def test_the_weight_of_multi_token_prediction_falls_where_the_rate_does():
    report = params(mtp_loss_weight=0.3, mtp_loss_weight_final=0.1)
    assert [mtp_loss_weight(step, report, Budget.even(148)) for step in (0, 99, 100, 147)] == [0.3, 0.3, 0.1, 0.1]


def test_the_averages_forget_the_first_weights_and_then_remember_as_long_as_asked():
    values = [ema_decay(step, params(ema_decay=0.99)) for step in range(1000)]
    assert values[:2] == [0.1, 2 / 11]
    assert values == sorted(values)
    assert values[889] < 0.99 == values[890] == values[-1]
    assert ema_decay(500, params(ema_decay=0.0)) == 0


@given(
    scheduler=st.sampled_from(SCHEDULERS),
    total_steps=st.integers(1, 5000),
    warmup_ratio=st.floats(0, 0.9),
    min_lr_ratio=st.floats(0, 1),
)
def test_a_rate_is_positive_never_above_the_peak_and_never_rises_after_the_warm_up(
    scheduler, total_steps, warmup_ratio, min_lr_ratio
):
    drawn = params(lr_scheduler_type=scheduler, warmup_ratio=warmup_ratio, min_lr_ratio=min_lr_ratio)
    drawn_rates = [learning_rate(step, drawn, Budget.even(total_steps)) for step in range(total_steps)]
    assert all(0 < rate <= 1.0 for rate in drawn_rates)
    after = drawn_rates[warmup_steps(drawn, Budget.even(total_steps)) :]
    assert all(later <= earlier for earlier, later in pairwise(after))

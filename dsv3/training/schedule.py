"""What changes over a training, as pure functions of the step and the budget.

The report states its schedules in tokens of a budget of 14.8 trillion. Here they are shares of the budget, so that a
run of minutes has the same shape as theirs of months, and so that any curve can be recomputed from params.yaml alone.
Nothing here has state: a resumed training needs to know only its step.

`step` counts optimizer steps from zero; step `n` is the one performed after `n` others.
"""

import math

from dsv3.params.train import TrainParams
from dsv3.training.budget import Budget

CONSTANT_UNTIL = 10.0 / 14.8
"""Share of the budget at the peak rate (report, section 4.2: 10 of 14.8 trillion tokens); lambda falls there too."""

COSINE_UNTIL = 14.3 / 14.8
"""End of the cosine decay from the peak to the first tail (4.3 trillion tokens)."""

FIRST_TAIL_UNTIL = 14.633 / 14.8
"""End of the first constant tail (333 billion tokens); the second lasts until the end (167 billion)."""

FIRST_TAIL_RATIO = 2.2e-5 / 2.2e-4
SECOND_TAIL_RATIO = 7.3e-6 / 2.2e-4


def learning_rate(step: int, params: TrainParams, budget: Budget) -> float:
    """Return the learning rate of `step`: a straight line up, then the decay of `lr_scheduler_type`.

    The warm-up is counted in steps, all else in tokens. The warm-up's last step and the first one after it have the
    peak rate. The end of the decay, `min_lr_ratio` times the peak, would be reached at the end of the budget: the last
    step that is performed lies just before it, so that neither the first nor the last step is spent at a rate of zero.
    """
    peak, warmup = params.learning_rate, warmup_steps(params, budget)
    if step < warmup:
        return peak * (step + 1) / warmup
    if params.lr_scheduler_type == "deepseek_v3":
        return peak * deepseek_v3_ratio(budget.share(step))
    warmed_up_at = budget.starts[warmup]
    progress = (budget.starts[step] - warmed_up_at) / max(1, budget.total - warmed_up_at)
    if params.lr_scheduler_type == "linear":
        return peak * (1 - (1 - params.min_lr_ratio) * progress)
    if params.lr_scheduler_type == "cosine":
        return peak * cosine(1.0, params.min_lr_ratio, progress)
    return peak


def warmup_steps(params: TrainParams, budget: Budget) -> int:
    """Return the number of steps in which the learning rate rises."""
    return round(params.warmup_ratio * budget.total_steps)


def deepseek_v3_ratio(share: float) -> float:
    """Return the rate at `share` of the budget, relative to its peak: constant, cosine, two tails (report, 4.2)."""
    if share < CONSTANT_UNTIL:
        return 1.0
    if share < COSINE_UNTIL:
        return cosine(1.0, FIRST_TAIL_RATIO, (share - CONSTANT_UNTIL) / (COSINE_UNTIL - CONSTANT_UNTIL))
    return FIRST_TAIL_RATIO if share < FIRST_TAIL_UNTIL else SECOND_TAIL_RATIO


def cosine(start: float, end: float, progress: float) -> float:
    """Return the value at `progress` in [0, 1] on half a cosine from `start` to `end`; both ends are exact."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def bias_update_rate(step: int, params: TrainParams, budget: Budget) -> float:
    """Return gamma of `step`: constant, then zero for the last `bias_freeze_ratio` of the budget (report, 4.2)."""
    return params.bias_update_rate if budget.starts[step] < (1 - params.bias_freeze_ratio) * budget.total else 0.0


def ema_decay(step: int, params: TrainParams) -> float:
    """Return beta_t of `step`, how much of the average of the weights it keeps: little at first, then `ema_decay`."""
    return min(params.ema_decay, (1 + step) / (10 + step))


def mtp_loss_weight(step: int, params: TrainParams, budget: Budget) -> float:
    """Return lambda of `step`: the first weight while the report's rate is constant, then the final one."""
    is_constant = budget.starts[step] < CONSTANT_UNTIL * budget.total
    return params.mtp_loss_weight if is_constant else params.mtp_loss_weight_final

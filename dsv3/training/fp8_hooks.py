"""What FP8 does to the training's numbers, measured on one micro-batch every so many steps.

The measurement repeats a forward and a backward pass of the training beside it, and leaves no trace: the routers'
counts and the random state are put back, and gradients are returned instead of accumulated. It runs the model as it is
before compilation, because a compiled model does not see hooks that came later.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dsv3.fp8.statistics import Found, Statistics, fp8_statistics
from dsv3.tracking.metrics import Cell
from dsv3.tracking.recorder import Recorder
from dsv3.training.loop import Run, micro_batch_output, step_seed
from dsv3.training.schedule import mtp_loss_weight
from dsv3.training.setup import fp8_recipe

WHOLE_MODEL = "model"
"""Module under which the sums over all modules are recorded; every module's name begins with it."""
OPERAND_KINDS = {"gate_up": "weight", "down": "weight"}
"""What an operand counts as in the sums over all modules; others keep their name."""


def log_fp8(run: Run, recorder: Recorder | None) -> None:
    """Write the rows of the step just done; the main process alone measures, on a micro-batch of its own."""
    if recorder is None:
        return
    for module, operands in with_sums(measured(run)).items():
        for operand, statistics in operands.items():
            row: dict[str, Cell] = {"step": run.state.step, "module": module, "operand": operand}
            recorder.log("fp8", row | statistics.shares())


def measured(run: Run) -> Found:
    """Return the statistics of the first micro-batch of the step just done, a pure function of step and weights."""
    params, step, layout = run.plan.params.train, run.state.step - 1, run.layout
    tokens = run.plan.batches.sequences(layout.sequences_before(step), layout.micro_batch_size)
    tokens, mtp_weight = tokens.to(run.accelerator.device), mtp_loss_weight(step, params, run.plan.budget)

    def loss() -> torch.Tensor:
        output = micro_batch_output(run, run.model.forward, tokens, mtp_weight)
        assert output.loss is not None, "targets were given"
        return output.loss / layout.accumulation(step) * layout.world_size

    with unnoticed(run):
        return fp8_statistics(run.model, loss, fp8_recipe(params))


@contextmanager
def unnoticed(run: Run) -> Iterator[None]:
    """Put random state and routers' counts back at the end of the block, which itself begins with the step's seed."""
    device, routers = run.accelerator.device, [router for _, router in run.model.routers()]
    loads = [router.expert_load.clone() for router in routers]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(step_seed(run))
        try:
            yield
        finally:
            for router, load in zip(routers, loads, strict=True):
                router.expert_load.copy_(load)


def with_sums(found: Found) -> Found:
    """Return `found` after the sums over all its modules, by kind of operand."""
    sums: dict[str, Statistics] = {}
    for operands in found.values():
        for operand, statistics in operands.items():
            kind = OPERAND_KINDS.get(operand, operand)
            sums[kind] = sums.get(kind, Statistics()) + statistics
    return {WHOLE_MODEL: sums, **found} if found else {}

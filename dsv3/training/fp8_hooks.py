"""What FP8 does to the training's numbers, measured on one micro-batch every `eval_steps` steps.

The measurement repeats a forward and a backward pass of the training and changes nothing in it: the routers' counts
and the random state are restored, and gradients are returned instead of accumulated. It calls the model as it was
before compilation, for a compiled model ignores hooks that are added later. A sharded model is called by all processes,
each on the same micro-batch, for its weights are gathered in the call.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dsv3.fp8.statistics import Found, Statistics, fp8_statistics
from dsv3.tracking.metrics import WHOLE_MODEL, Cell
from dsv3.tracking.recorder import Recorder
from dsv3.training.loop import Run, micro_batch_output
from dsv3.training.precision import fp8_recipe
from dsv3.training.schedule import mtp_loss_weight
from dsv3.training.sharding import is_sharded

OPERAND_KINDS = {"gate_up": "weight", "down": "weight"}
"""Operand -> its name in the sums over all modules; others keep theirs."""


def log_fp8(run: Run, recorder: Recorder | None) -> None:
    """Write the rows of the last step; of replicas only the main process measures."""
    if recorder is None and not is_sharded(run.model):
        return
    found = measure_fp8(run)
    if recorder is None:
        return
    for module, operands in with_totals(found).items():
        for operand, statistics in operands.items():
            row: dict[str, Cell] = {"step": run.state.step, "module": module, "operand": operand}
            recorder.log("fp8", row | statistics.shares())


def measure_fp8(run: Run) -> Found:
    """Return the statistics of the first micro-batch of the last step; they depend on step and weights alone."""
    params, step, layout = run.plan.params.train, run.state.step - 1, run.layout
    tokens = run.plan.batches.sequences(layout.sequences_before(step), layout.micro_batch_size)
    tokens, mtp_weight = tokens.to(run.accelerator.device), mtp_loss_weight(step, params, run.plan.budget)

    def loss() -> torch.Tensor:
        forward = run.model if is_sharded(run.model) else run.model.forward
        output = micro_batch_output(run, forward, layout.starts[step], tokens, mtp_weight)
        assert output.loss is not None, "targets were given"
        return output.loss / layout.accumulation(step) * layout.world_size

    with preserve_training_state(run):
        return fp8_statistics(run.model, loss, fp8_recipe(params))


@contextmanager
def preserve_training_state(run: Run) -> Iterator[None]:
    """Run the block; restore random state and routers' counts at its end."""
    device, routers = run.accelerator.device, [router for _, router in run.model.routers()]
    loads = [router.expert_load.clone() for router in routers]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for router, load in zip(routers, loads, strict=True):
                router.expert_load.copy_(load)


def with_totals(found: Found) -> Found:
    """Return `found` with the sums over all its modules first, by kind of operand."""
    sums: dict[str, Statistics] = {}
    for operands in found.values():
        for operand, statistics in operands.items():
            kind = OPERAND_KINDS.get(operand, operand)
            sums[kind] = sums.get(kind, Statistics()) + statistics
    return {WHOLE_MODEL: sums, **found} if found else {}

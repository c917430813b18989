"""What happens between steps and is not learning: curves, validation, checkpoints.

Letters: L layers, E n_routed_experts.
"""

import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from dsv3.errors import DiskFull, UserError
from dsv3.kernels.weight_cache import cached_weights
from dsv3.progress import Progress
from dsv3.scores import perplexity
from dsv3.tracking.recorder import Recorder
from dsv3.training.averaging import averaged_weights
from dsv3.training.background import Background
from dsv3.training.balancing import router_rows
from dsv3.training.checkpoint import prune, save_best, save_checkpoint
from dsv3.training.loop import Run
from dsv3.training.schedule import bias_update_rate, learning_rate, mtp_loss_weight
from dsv3.training.sharding import is_sharded, local
from dsv3.training.state import StepSums
from dsv3.training.validation import block_batches, summed_loss

Row = dict[str, int | float]

NON_FINITE_REMEDY = (
    "the last checkpoint stays, and would meet it again; lower train.learning_rate, or raise train.adam_epsilon or "
    "train.warmup_ratio"
)


def log_curves(run: Run, recorder: Recorder | None) -> None:
    """Write the history's and the routers' rows of the steps since the last ones."""
    sums, run.state.step_sums = run.state.step_sums, StepSums()
    if recorder is None:
        return
    recorder.log("history", history_row(run, sums))
    if sums.load_LE:
        load_LE, batch_max_vio_L = torch.tensor(sums.load_LE), [vio / sums.num_steps for vio in sums.max_vio_L]
        for row in router_rows(run.model.routers(), load_LE, batch_max_vio_L, run.state.step):
            recorder.log("router", row)


def history_row(run: Run, sums: StepSums) -> Row:
    """Return one row of the history: means over the steps of `sums`, and the schedules of the last one."""
    plan, params, step = run.plan, run.plan.params.train, run.state.step
    row: Row = {
        "step": step,
        "epoch": plan.epochs_before(step),
        "tokens_seen": plan.tokens_before(step),
        "loss": sums.mean("loss"),
        "total_loss": sums.mean("total_loss"),
        "grad_norm": sums.mean("grad_norm"),
        "learning_rate": learning_rate(step - 1, params, plan.budget),
        "bias_update_rate": bias_update_rate(step - 1, params, plan.budget),
        "step_s": sums.elapsed_s / sums.num_steps,
        "tokens_per_s": tokens_per_s(run, sums),
        "peak_memory_bytes": peak_memory_bytes(run.accelerator.device),
    }
    row["model_flops_per_s"] = plan.flops(range(step - sums.num_steps, step)) / sums.elapsed_s
    if params.sequence_loss_weight:
        row["sequence_loss"] = sums.mean("sequence_loss")
    if run.model.config.num_nextn_predict_layers:
        weights = [mtp_loss_weight(one, params, plan.budget) for one in range(step - sums.num_steps, step)]
        row["mtp_loss_weight"] = weights[-1]
        if all(weights):  # where lambda is 0 the modules are not asked
            row["mtp_loss"] = sums.mean("mtp_loss")
    return row


def tokens_per_s(run: Run, sums: StepSums) -> float:
    """Return the training tokens per second of the steps in `sums`, the latest ones."""
    plan, step = run.plan, run.state.step
    return (plan.tokens_before(step) - plan.tokens_before(step - sums.num_steps)) / sums.elapsed_s


def progress_values(run: Run) -> dict[str, float]:
    """Return the mean loss since the last row of the history, the rate and the speed."""
    state, sums = run.state, run.state.step_sums
    rate = learning_rate(state.step - 1, run.plan.params.train, run.plan.budget)
    return {"loss": sums.mean("loss"), "lr": rate, "tok/s": tokens_per_s(run, sums)}


def show_progress(run: Run, progress: Progress, values: Mapping[str, float]) -> None:
    """Show the step with its `values` and the latest validation loss."""
    validated = {} if run.state.validation_loss is None else {"val": run.state.validation_loss}
    loss, *others = values.items()
    progress.update(run.state.step, dict([loss, *validated.items(), *others]))


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that was ever taken: of the GPU by tensors, or of the machine by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def validate(run: Run, recorder: Recorder | None, directory: Path, progress: Progress) -> None:
    """Write a row of the validation loss; keep the weights if they are the best and are wanted.

    Raises `UserError` where the loss is not finite: nothing is saved or exported then, and earlier checkpoints stay.
    """
    keeps_best = run.plan.params.train.load_best_model_at_end
    with averaged_weights(run.model, run.optimizer):
        nats = summed_validation_loss(run)
        loss = run.state.validation_loss = nats / (len(run.plan.validation) - 1)
        if not math.isfinite(loss):
            raise UserError(f"step {run.state.step}: validation loss is {loss}; must be finite; {NON_FINITE_REMEDY}")
        if run.state.best_loss is None or loss < run.state.best_loss:
            run.state.best_loss, run.state.best_step = loss, run.state.step
            if keeps_best and (is_sharded(run.model) or run.accelerator.is_main_process):
                save_best(directory, run.model, run.state.step)
    if recorder is not None:
        row = validation_row(run, nats, loss)
        recorder.log("validation", row)
        best = ", the lowest so far" if run.state.best_step == run.state.step else ""
        line = f"step {row['step']:,}: validation {loss:.4f} nats/token, {row['nats_per_char']:.4f} nats/char{best}"
        progress.note(line, row)


def summed_validation_loss(run: Run) -> float:
    """Return the cross-entropy in nats of the validation split's targets, by all processes together."""
    stream, params, layout = run.plan.validation, run.plan.params.train, run.layout
    batches = block_batches(len(stream), params.block_size, params.per_device_eval_batch_size)
    own_batches, device = batches[layout.rank :: layout.world_size], run.accelerator.device
    run.model.eval()
    with cached_weights(run.model):
        own = summed_loss(run.forward, stream, own_batches, device, run.position_ids)
        if is_sharded(run.model) and len(own_batches) < -(-len(batches) // layout.world_size):
            # The others gather the weights once more, and wait until all do.
            summed_loss(run.forward, stream, batches[:1], device, run.position_ids)
    run.model.train()
    return run.all_reduce(torch.tensor(own, dtype=torch.float64, device=device)).item()


def validation_row(run: Run, nats: float, loss: float) -> Row:
    """Return one row of the validation table."""
    return {
        "step": run.state.step,
        "tokens_seen": run.plan.tokens_before(run.state.step),
        "loss": loss,
        "perplexity": perplexity(loss),
        "nats_per_char": nats / run.plan.meta["splits"]["validation"]["characters"],
        "best_loss": run.state.best_loss if run.state.best_loss is not None else loss,
        "best_step": run.state.best_step,
    }


def check_weights_are_finite(run: Run) -> None:
    """Raise `UserError` where a weight is not a finite number; gradients can be finite and their update not."""
    if name := non_finite_tensor(run):
        raise UserError(
            f"step {run.state.step}: {name} holds a number that is not finite; nothing is saved or exported; "
            f"{NON_FINITE_REMEDY}"
        )


def non_finite_tensor(run: Run) -> str:
    """Return the name of a weight or buffer with a number that is not finite, or an empty text; a collective.

    A shard's process knows its own numbers only; all must come to the same end.
    """
    names, tensors = zip(*run.model.named_parameters(), *run.model.named_buffers(), strict=True)
    device = run.accelerator.device
    is_bad = torch.stack([~local(tensor).isfinite().all().to(device) for tensor in tensors]).float()
    bad = (name for name, count in zip(names, run.all_reduce(is_bad).tolist(), strict=True) if count)
    return next(bad, "")


def save_or_go_on(run: Run, recorder: Recorder | None, directory: Path, background: Background | None) -> None:
    """Write a checkpoint; before the last step a training goes on without it where the disk is full, which is said.

    One that is sharded ends: its processes don't all learn of it.
    """
    try:
        save(run, recorder, directory, background)
    except DiskFull as full:
        if run.state.step == run.plan.total_steps or is_sharded(run.model):
            raise
        tqdm.write(f"step {run.state.step}: not saved, the training goes on: {full}")
        run.accelerator.wait_for_everyone()


def save(run: Run, recorder: Recorder | None, directory: Path, background: Background | None) -> None:
    """Write a checkpoint, then remove the ones it replaces. Every process waits for it, unless it is in `background`.

    Raises `UserError` where a weight is not finite; the checkpoints that are there stay.
    """
    check_weights_are_finite(run)
    if recorder is not None or is_sharded(run.model):
        state = {
            **run.state.to_json(),
            "total_steps": run.plan.total_steps,
            **({"rows": recorder.state(), "aim_run_hash": recorder.run_hash} if recorder is not None else {}),
        }
        save_checkpoint(directory, run.model, run.optimizer, run.model.config.to_dict(), state, background)
    limit, best_step = run.plan.params.runtime.save_total_limit, run.state.best_step
    if background is not None:
        background.afterwards(lambda: prune(directory, limit, best_step) if recorder is not None else None)
        return
    if recorder is not None:
        prune(directory, limit, best_step)
    run.accelerator.wait_for_everyone()

"""What happens between steps and is not learning: curves, validation, checkpoints.

Letters: L layers, E n_routed_experts.
"""

import math
import resource
import sys
from pathlib import Path

import torch

from dsv3.kernels.weight_cache import cached_weights
from dsv3.tracking.recorder import Recorder
from dsv3.training.balancing import router_rows
from dsv3.training.checkpoint import prune, save_best, save_checkpoint
from dsv3.training.loop import Run
from dsv3.training.schedule import bias_update_rate, learning_rate, mtp_loss_weight
from dsv3.training.state import Window
from dsv3.training.validation import block_batches, summed_loss

Row = dict[str, int | float]


def log_curves(run: Run, recorder: Recorder | None) -> None:
    """Write the history's and the routers' rows of the steps since the last ones."""
    window, run.state.window = run.state.window, Window()
    if recorder is None:
        return
    recorder.log("history", history_row(run, window))
    if window.load_LE:
        load_LE, batch_max_vio_L = torch.tensor(window.load_LE), [vio / window.num_steps for vio in window.max_vio_L]
        for row in router_rows(run.model.routers(), load_LE, batch_max_vio_L, run.state.step):
            recorder.log("router", row)


def history_row(run: Run, window: Window) -> Row:
    """Return one row of the history: means over the window, and the schedules of its last step."""
    plan, params, step = run.plan, run.plan.params.train, run.state.step
    row: Row = {
        "step": step,
        "epoch": plan.epochs_before(step),
        "tokens_seen": plan.tokens_before(step),
        "loss": window.mean("loss"),
        "total_loss": window.mean("total_loss"),
        "grad_norm": window.mean("grad_norm"),
        "learning_rate": learning_rate(step - 1, params, plan.budget),
        "bias_update_rate": bias_update_rate(step - 1, params, plan.budget),
        "step_s": window.elapsed_s / window.num_steps,
        "tokens_per_s": (plan.tokens_before(step) - plan.tokens_before(step - window.num_steps)) / window.elapsed_s,
        "peak_memory_bytes": peak_memory_bytes(run.accelerator.device),
    }
    row["model_flops_per_s"] = row["tokens_per_s"] * plan.flops_per_token
    if params.sequence_loss_weight:
        row["sequence_loss"] = window.mean("sequence_loss")
    if run.model.config.num_nextn_predict_layers:
        row["mtp_loss"] = window.mean("mtp_loss")
        row["mtp_loss_weight"] = mtp_loss_weight(step - 1, params, plan.budget)
    return row


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that was ever taken: of the GPU by tensors, or of the machine by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def validate(run: Run, recorder: Recorder | None, directory: Path) -> None:
    """Write a row of the validation loss; keep the weights if they are the best and are wanted."""
    stream, params, layout = run.plan.validation, run.plan.params.train, run.layout
    batches = block_batches(len(stream), params.block_size, params.per_device_eval_batch_size)
    run.model.eval()
    own_batches, device = batches[layout.rank :: layout.world_size], run.accelerator.device
    with cached_weights(run.model):
        own = summed_loss(run.forward, stream, own_batches, device, run.position_ids)
    run.model.train()
    nats = run.summed(torch.tensor(own, dtype=torch.float64, device=device)).item()
    loss = nats / (len(stream) - 1)
    if run.state.best_loss is None or loss < run.state.best_loss:
        run.state.best_loss, run.state.best_step = loss, run.state.step
        if params.load_best_model_at_end and run.accelerator.is_main_process:
            save_best(directory, run.model, run.state.step)
    if recorder is not None:
        recorder.log("validation", validation_row(run, nats, loss))


def validation_row(run: Run, nats: float, loss: float) -> Row:
    """Return one row of the validation table."""
    return {
        "step": run.state.step,
        "tokens_seen": run.plan.tokens_before(run.state.step),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "nats_per_char": nats / run.plan.meta["splits"]["validation"]["characters"],
        "best_loss": run.state.best_loss if run.state.best_loss is not None else loss,
        "best_step": run.state.best_step,
    }


def save(run: Run, recorder: Recorder | None, directory: Path) -> None:
    """Write a checkpoint, then remove the ones it replaces. Every process waits for it."""
    if recorder is not None:
        state = {
            **run.state.to_json(),
            "total_steps": run.plan.total_steps,
            "rows": recorder.state(),
            "aim_run_hash": recorder.run_hash,
        }
        save_checkpoint(directory, run.model, run.optimizer, run.model.config.to_dict(), state)
        prune(directory, run.plan.params.runtime.save_total_limit, run.state.best_step)
    run.accelerator.wait_for_everyone()

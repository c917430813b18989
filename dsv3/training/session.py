"""One training from beginning to end: resumed or started, trained, recorded, exported; its last checkpoint stays."""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from dsv3.artifacts import read_json, sweep, write_json
from dsv3.errors import Interrupted, UserError, one_line
from dsv3.export.huggingface import export_huggingface
from dsv3.export.model_card import INITIAL_WEIGHTS, TEACHERS, model_card
from dsv3.progress import Progress, ProgressMode, shown_progress
from dsv3.tracking.events import LastLine, Result
from dsv3.tracking.identity import experiment_name, project_root, run_identity
from dsv3.tracking.recorder import Recorder, open_recorder
from dsv3.training import fp8_hooks, hooks
from dsv3.training.averaging import exchange_with_averages
from dsv3.training.background import Background, background_writing
from dsv3.training.checkpoint import (
    best_folder,
    check_checkpoint,
    checkpoints,
    delete_checkpoints,
    load_best,
    load_checkpoint,
    set_aside_damaged,
)
from dsv3.training.fingerprint import Fingerprint, other_checkpoints, write_facts
from dsv3.training.heartbeat import watching_processes
from dsv3.training.interruption import Interruption, catching_signals
from dsv3.training.leftovers import remove_leftovers
from dsv3.training.lock import hold_lock
from dsv3.training.loop import Hook, Run, train
from dsv3.training.model import model_of
from dsv3.training.plan import TrainingPlan
from dsv3.training.setup import Choices, prepare_model, prepare_run, run_fingerprint, start_accelerator
from dsv3.training.sharding import gather_weights, is_sharded
from dsv3.training.state import TrainState

POWERS_OF_TWO = "powers of two: exported in FP8 with --power-of-two-scales"


@dataclass(frozen=True)
class Outputs:
    """Where the results go, and the files whose content they carry on."""

    tokens: Path
    model: Path
    results: Path
    manifest: Mapping[str, Any]
    """The corpus's manifest."""


def run_training(
    plan: TrainingPlan, outputs: Outputs, progress_mode: ProgressMode = ProgressMode.auto
) -> dict[str, Any] | None:
    """Train, from the newest checkpoint where there is one, and write `outputs`; return the metrics.

    Only the main process writes, and returns metrics. Raises `Interrupted` after SIGINT or SIGTERM, when everything is
    saved.
    """
    with catching_signals() as interruption:
        accelerator = start_accelerator(plan)
        with watching_processes():
            return train_and_export(plan, accelerator, interruption, outputs, progress_mode)


def train_and_export(
    plan: TrainingPlan,
    accelerator: Accelerator,
    interruption: Interruption,
    outputs: Outputs,
    progress_mode: ProgressMode,
) -> dict[str, Any] | None:
    """Train, as one of the processes that `accelerator` knows, and write `outputs`; return the metrics."""
    model, chosen = prepare_model(plan, accelerator.device)
    fingerprint = run_fingerprint(plan, chosen)
    with hold_checkpoints(plan, fingerprint, accelerator.is_main_process) as directory:
        accelerator.wait_for_everyone()
        run = prepare_run(plan, accelerator, model, interruption)
        saved = resume_or_start(run, directory, fingerprint)
        recorder = None
        if accelerator.is_main_process:
            recorder = start_recorder(plan, chosen, fingerprint, outputs, saved.get("aim_run_hash"))
        with closing_as_it_ends(recorder):
            if recorder is not None and saved:
                recorder.restore(saved["rows"])
            mode = progress_mode if accelerator.is_main_process else ProgressMode.none
            with shown_progress(mode, "train", plan.total_steps, "step", run.state.step) as progress:
                progress.note(chosen.summary(), chosen.metrics())
                with background_writing(plan.params.runtime) as background:
                    hooks_of_run = training_hooks(run, recorder, directory, progress, background)
                    train(run, hooks_of_run, checkpoint_writer(recorder, directory, background))
            metrics = export_and_record(run, recorder, chosen, directory, outputs)
        if accelerator.is_main_process:
            leave_last_checkpoint(run, directory, fingerprint)
        accelerator.wait_for_everyone()
    return metrics


def leave_last_checkpoint(run: Run, directory: Path, fingerprint: Fingerprint) -> None:
    """Delete the checkpoints of a finished training but for its last one; say how long that stays, and what for."""
    params = run.plan.params
    last, best = checkpoints(directory)[-1], best_folder(directory, run.state.best_step)
    delete_checkpoints(directory, {last, best})
    keeps = params.runtime.keep_last_checkpoint
    write_facts(directory, fingerprint, experiment_name(params), "kept" if keeps else "finished")
    use = (
        "a longer training goes on from it by train.resume_from_checkpoint"
        if keeps
        else "until another training begins; should DVC fail now, dvc repro exports from it and trains nothing"
    )
    size = sum(file.stat().st_size for folder in (last, best) for file in folder.glob("*"))
    tqdm.write(f"kept {last} ({size / 1e6:,.1f} MB): {use}")


@contextmanager
def closing_as_it_ends(recorder: Recorder | None) -> Iterator[None]:
    """Close the recorder at the end of the block, as finished, interrupted or failed."""
    status = "finished"
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, Interrupted) else "failed"
        if recorder is not None:
            recorder.show(LastLine(last_line(error)))
        raise
    finally:
        if recorder is not None:
            recorder.close(status)


def last_line(error: BaseException) -> str:
    """Return the line that ends a training, as the command line shows it."""
    is_expected = isinstance(error, (Interrupted, UserError))
    return one_line(error if is_expected else f"{type(error).__name__}: {error}")


@contextmanager
def hold_checkpoints(plan: TrainingPlan, fingerprint: Fingerprint, is_main_process: bool) -> Iterator[Path]:
    """Yield the folder of this training's checkpoints, locked for it and with its facts; remove it if nothing is saved.

    Only the main process does anything there. Raises `UserError` where another training holds it.
    """
    directory = project_root() / ".checkpoints" / fingerprint.digest
    if not is_main_process:
        yield directory
        return
    with hold_lock(directory):
        if line := sweep([*directory.parent.iterdir()]):
            tqdm.write(line)
        write_facts(directory, fingerprint, experiment_name(plan.params))
        try:
            yield directory
        finally:
            if not any(path.is_dir() for path in directory.glob("*")):
                shutil.rmtree(directory, ignore_errors=True)


def resume_or_start(run: Run, directory: Path, fingerprint: Fingerprint) -> dict[str, Any]:
    """Bring `run` to the newest whole checkpoint in `directory`, as `runtime.resume` allows; return what else it held.

    Where there is none, say which ones of other trainings are there, and start.
    """
    params = run.plan.params
    mode = params.runtime.resume
    found = None if mode == "never" else agree_on_checkpoint(run, directory)
    if found:
        saved = load_checkpoint(found, run.model, run.optimizer)
        run.state = TrainState.from_json(saved)
        remove_leftovers_unless_finished(run, directory)
        return saved
    others = other_checkpoints(directory, fingerprint, experiment_name(params))
    if mode == "must":
        raise UserError(
            f"params.yaml: runtime.resume is must; no checkpoint in {directory}, the place of these parameters, data "
            f"and code; set it to auto to start afresh{'; ' if others else ''}{others}"
        )
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        if others:
            tqdm.write(others)
        if mode == "never":
            delete_checkpoints(directory)
    saved = start_from_named_checkpoint(run)
    remove_leftovers_unless_finished(run, directory)
    return saved


def remove_leftovers_unless_finished(run: Run, directory: Path) -> None:
    """Remove what other trainings have left, unless this one is finished and only exports again, which is said."""
    params = run.plan.params
    if not run.accelerator.is_main_process:
        return
    if run.state.step == run.plan.total_steps:
        tqdm.write("finished already: exported again from its last checkpoint; runtime.resume: never trains it anew")
        return
    remove_leftovers(directory, params.runtime.keep_abandoned_days, named_checkpoint(run), tqdm.write)


def named_checkpoint(run: Run) -> Path | None:
    """Return the folder that `train.resume_from_checkpoint` names, from the project's root or from `~`; else None."""
    name = run.plan.params.train.resume_from_checkpoint
    return None if name is None else project_root() / os.path.expanduser(name)  # noqa: PTH111 -- as data.path


def agree_on_checkpoint(run: Run, directory: Path) -> Path | None:
    """Choose the newest whole checkpoint on the main process, which compares the files, and return it on every one."""
    names: list[str | None] = [None]
    if run.accelerator.is_main_process:
        start = time.perf_counter()
        found = set_aside_damaged(directory, run.plan.params.train.load_best_model_at_end, tqdm.write)
        if found is not None:
            names[0] = found.name
            tqdm.write(f"resuming {found}, whole by its SHA-256 ({time.perf_counter() - start:.2f} s)")
    (name,) = broadcast_object_list(names)
    return directory / name if name else None


def share_refusal(run: Run, check: Callable[[], None]) -> None:
    """Make a check on the main process, which reads every file for it; raise its `UserError` on all of them.

    The others would wait for the main one until torch tells them that it has gone.
    """
    refusals = [""]
    if run.accelerator.is_main_process:
        try:
            check()
        except UserError as error:
            refusals[0] = str(error)
    (refusal,) = broadcast_object_list(refusals)
    if refusal:
        raise UserError(refusal)


def start_from_named_checkpoint(run: Run) -> dict[str, Any]:
    """Bring `run` to the checkpoint that `train.resume_from_checkpoint` names, if any; return what else it held.

    Checkpoints hold master weights under DeepSeek's names and know no precision, so that a training in FP8 may go on in
    bf16 and back. The new training has a run of its own in the trackers, with the other's curves up to here.
    """
    folder = named_checkpoint(run)
    if folder is None:
        return {}
    where = f"train.resume_from_checkpoint is {folder}"
    share_refusal(run, lambda: check_checkpoint(folder, run.model.config.to_dict(), run.plan.total_steps))
    try:
        saved = load_checkpoint(folder, run.model, run.optimizer)
    except ValueError as error:  # parameter groups of another optimizer
        raise UserError(f"{where}; {error}; keep train.optim as it was") from None
    if tensor := hooks.non_finite_tensor(run):
        raise UserError(f"{where}; {tensor} holds a number that is not finite; name an earlier checkpoint")
    # The other training's best weights lie in its own folder, and may go: the best ones are looked for from here on.
    run.state = replace(TrainState.from_json(saved), best_loss=None, best_step=0)
    return {**saved, "aim_run_hash": None}


def start_recorder(
    plan: TrainingPlan, chosen: Choices, fingerprint: Fingerprint, outputs: Outputs, run_hash: str | None
) -> Recorder:
    """Return the run's recorder, opened; `run_hash` is the checkpoint's, where the training goes on from one."""
    data = {**plan.meta, "corpus": {**plan.meta.get("corpus", {}), **outputs.manifest}}
    architecture = read_json(Path(plan.params.model.config))
    identity = run_identity(plan.params, fingerprint.digest, architecture, data, plan.size, asdict(chosen))
    identity = replace(identity, plan_summary=plan.summary())
    return open_recorder(outputs.results, plan.params.runtime, identity, run_hash)


def training_hooks(
    run: Run, recorder: Recorder | None, directory: Path, progress: Progress, background: Background | None = None
) -> list[Hook]:
    """Return what happens between steps. Checkpoints come last, so that they hold what the others recorded.

    What progress shows is taken before the curves' row ends its sums, and shown with the step's own validation.
    """
    train, runtime = run.plan.params.train, run.plan.params.runtime
    fp8 = [Hook(train.eval_steps, lambda run: fp8_hooks.log_fp8(run, recorder))] if train.use_fp8 else []
    shown: dict[str, float] = {}
    return [
        Hook(1, lambda run: shown.update(hooks.progress_values(run))),
        Hook(runtime.logging_steps, lambda run: hooks.log_curves(run, recorder)),
        Hook(train.eval_steps, lambda run: hooks.validate(run, recorder, directory, progress)),
        Hook(1, lambda run: hooks.show_progress(run, progress, shown)),
        *fp8,
        Hook(runtime.save_steps, lambda run: hooks.save_or_go_on(run, recorder, directory, background)),
    ]


def checkpoint_writer(
    recorder: Recorder | None, directory: Path, background: Background | None
) -> Callable[[Run], None]:
    """Return the function that writes a checkpoint of a run into `directory`, before the training ends."""

    def write(run: Run) -> None:
        if background is not None:
            background.wait()
        hooks.save(run, recorder, directory, None)

    return write


def export_and_record(
    run: Run, recorder: Recorder | None, chosen: Choices, directory: Path, outputs: Outputs
) -> dict[str, Any] | None:
    """Write the model, run.json, metrics.json and headline.json; return the metrics; only in the main process."""
    hooks.check_weights_are_finite(run)
    shards = is_sharded(run.model)
    if not run.plan.params.train.load_best_model_at_end:
        exchange_with_averages(run.model, run.optimizer)
    elif shards or recorder is not None:
        load_best(directory, run.model, run.state.best_step)
    weights = gather_weights(run.model) if shards else {}
    if recorder is None:
        return None
    model = model_of(Path(run.plan.params.model.config), weights) if shards else run.model
    recorder.write_tables()  # DVC may have deleted them: it starts a stage again while the orphan of another still runs
    metrics = final_metrics(run, recorder, chosen)
    scores = validation_of(recorder, metrics["exported_step"])
    card = model_card(model_facts(run, recorder, chosen, outputs), scores, outputs.manifest)
    export_huggingface(model, model.state_dict(), outputs.tokens, outputs.model, card)
    write_json(outputs.results / "run.json", {**recorder.run_record(), "step": run.state.step})
    write_json(outputs.results / "metrics.json", metrics)
    write_json(outputs.results / "headline.json", headline(metrics))
    recorder.show(Result("train", metrics, run.state.step))
    tqdm.write(result_line(metrics, outputs.model))  # before the tracker that keeps the log is closed
    return metrics


def final_metrics(run: Run, recorder: Recorder, chosen: Choices) -> dict[str, Any]:
    """Return the content of results/train/metrics.json."""
    rows = recorder.state()
    last, is_best = rows["history"][-1], run.plan.params.train.load_best_model_at_end
    exported_step = run.state.best_step if is_best else run.state.step
    exported, latest = validation_of(recorder, exported_step), rows["validation"][-1]
    return {
        "step": run.state.step,
        "tokens_seen": last["tokens_seen"],
        "epoch": last["epoch"],
        "loss": last["loss"],
        "validation": {
            **{name: exported[name] for name in ("loss", "nats_per_char")},  # of the weights that are exported
            **{name: latest[name] for name in ("best_loss", "best_step")},
        },
        "exported_step": exported_step,
        "tokens_per_s": statistics.median(float(row["tokens_per_s"]) for row in rows["history"]),
        "train_s": run.state.train_s,
        "peak_memory_bytes": last["peak_memory_bytes"],
        **chosen.metrics(),
    }


def validation_of(recorder: Recorder, step: int) -> dict[str, Any]:
    """Return the last row of the validation table at `step`, whose weights are exported."""
    return [row for row in recorder.state()["validation"] if row["step"] == step][-1]


def headline(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the few numbers of a training by which runs are compared."""
    return {
        "val_loss": metrics["validation"]["loss"],
        "tokens_s": round(metrics["tokens_per_s"]),
        "minutes": round(metrics["train_s"] / 60, 2),
    }


def result_line(metrics: Mapping[str, Any], model: Path) -> str:
    """Return the training's last line for the terminal."""
    validation = metrics["validation"]
    return (
        f"{model}: step {metrics['exported_step']}, validation {validation['loss']:.4f} nats/token, "
        f"{validation['nats_per_char']:.4f} nats/char; {metrics['tokens_per_s']:,.0f} tokens/s "
        f"({metrics['precision']}, {metrics['experts']}, {metrics['device']} x {metrics['num_processes']})"
    )


def model_facts(run: Run, recorder: Recorder, chosen: Choices, outputs: Outputs) -> dict[str, Any]:
    """Return the facts of the model card: what the weights come from."""
    record, plan = recorder.run_record(), run.plan
    train = plan.params.train
    return {
        "configuration": plan.params.model.config,
        "text SHA-256": outputs.manifest.get("sha256"),
        "tokens SHA-256": plan.meta["sha256"],
        **({INITIAL_WEIGHTS: str(plan.initial_weights)} if plan.initial_weights else {}),
        **({TEACHERS: "; ".join(map(str, plan.teachers))} if plan.teachers else {}),
        "optimizer steps": run.state.step,
        "training tokens": plan.tokens_before(run.state.step),
        "linear layers in": chosen.precision,
        **({"FP8 scales": POWERS_OF_TWO} if train.use_fp8 and train.fp8_power_of_two_scales else {}),
        **({"weights averaged with decay": train.ema_decay} if train.ema_decay else {}),
        "seed": plan.params.seed,
        "commit": f"{record['dvc']['git_sha']}{' and local changes' if record['dvc']['git_dirty'] else ''}",
        "fingerprint": record["fingerprint"],
    }

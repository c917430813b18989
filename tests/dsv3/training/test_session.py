import json
import math
import os
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from dsv3.artifacts import file_content, temporary_name
from dsv3.errors import DiskFull, Interrupted, UserError
from dsv3.progress import ProgressMode
from dsv3.tracking.metrics import TABLES
from dsv3.training import hooks, session
from dsv3.training.checkpoint import damage_of
from dsv3.training.loop import Run
from dsv3.training.session import Outputs, run_training
from dsv3.training.setup import prepare_model, run_fingerprint, start_accelerator
from tests.training_inputs import plan_of


@pytest.fixture(autouse=True)
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(folder: Path, **sections: dict) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    outputs = Outputs(folder / "tokens", folder / "final_model", folder / "results", {"source": "made up"})
    metrics = run_training(plan_of(folder, **sections), outputs)
    assert metrics is not None
    return metrics


def interrupted_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Have every training told to stop after `step`, so that the next one is its last."""

    def stopping(run: Run, *arguments: Any) -> None:
        log_curves(run, *arguments)
        if run.state.step == step:
            run.interruption.remember(2, None)

    log_curves = hooks.log_curves
    monkeypatch.setattr(hooks, "log_curves", stopping)


def fingerprint_of(folder: Path, **sections: dict) -> str:
    AcceleratorState._reset_state(reset_partial_state=True)
    plan = plan_of(folder, **sections)
    _, chosen = prepare_model(plan, start_accelerator(plan).device)
    return run_fingerprint(plan, chosen).digest


def test_the_best_weights_are_exported_when_they_are_wanted(tmp_path, monkeypatch):
    def spoil(run: Run, *arguments: Any) -> None:
        log_curves(run, *arguments)
        if run.state.step == 8:
            with torch.no_grad():
                run.model.lm_head.weight.mul_(-20)

    log_curves = hooks.log_curves
    monkeypatch.setattr(hooks, "log_curves", spoil)
    last = trained(tmp_path / "last", train={"max_steps": 10, "eval_steps": 2})
    best = trained(tmp_path / "best", train={"max_steps": 10, "eval_steps": 2, "load_best_model_at_end": True})
    assert (last["exported_step"], best["exported_step"], best["validation"]["best_step"]) == (10, 6, 6)
    assert best["validation"]["best_loss"] == best["validation"]["loss"] < last["validation"]["loss"]
    for name, loss in (("last", last["validation"]["loss"]), ("best", best["validation"]["loss"])):
        card = ModelCard.load(tmp_path / name / "final_model" / "README.md")
        assert card.data.eval_results[0].metric_value == loss  # of the weights beside the card
    files = [tmp_path / name / "final_model" / "model.safetensors" for name in ("last", "best")]
    heads = [load_file(file)["lm_head.weight"] for file in files]
    assert heads[0].abs().max() > 5 * heads[1].abs().max()


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (None, ["close finished"]),
        (
            Interrupted("stopped after step 2 of 9, saved", 130),
            ["stopped after step 2 of 9, saved", "close interrupted"],
        ),
        (UserError("step 2: loss is nan;\n lower it"), ["step 2: loss is nan; lower it", "close failed"]),
        (ZeroDivisionError("division"), ["ZeroDivisionError: division", "close failed"]),
    ],
    ids=str,
)
def test_trackers_are_told_why_a_training_stopped_before_they_are_closed(error, shown):
    told = []
    recorder: Any = SimpleNamespace(
        show=lambda event: told.append(event.text), close=lambda status: told.append(f"close {status}")
    )
    with nullcontext() if error is None else pytest.raises(type(error)), session.closing_as_it_ends(recorder):
        if error is not None:
            raise error
    assert told == shown


def test_trackers_are_shown_the_plan(tmp_path, monkeypatch):
    identities, open_recorder = [], session.open_recorder
    monkeypatch.setattr(session, "open_recorder", lambda *args: identities.append(args[2]) or open_recorder(*args))
    trained(tmp_path, train={"max_steps": 2})
    assert identities[0].plan_summary == plan_of(tmp_path, train={"max_steps": 2}).summary()


def test_what_ran_is_recorded(tmp_path):
    metrics = trained(tmp_path, train={"max_steps": 2})
    chosen = {name: metrics[name] for name in ("device", "num_processes", "precision", "experts", "cross_entropy")}
    expected = {"precision": "fp32", "experts": "dsv3_cpu_fp32", "cross_entropy": "plain", "num_processes": 1}
    assert chosen == {"device": "cpu", **expected}
    record = json.loads((tmp_path / "results" / "run.json").read_text())
    assert expected.items() <= record["env"].items()
    assert record["fingerprint"] == fingerprint_of(tmp_path, train={"max_steps": 2})


def test_the_card_says_that_a_training_had_scales_that_are_powers_of_two(tmp_path):
    train = {"max_steps": 2, "use_fp8": True}
    trained(tmp_path / "fp32", train=train)
    trained(tmp_path / "ue8m0", train={**train, "fp8_power_of_two_scales": True})
    cards = [(tmp_path / name / "final_model" / "README.md").read_text() for name in ("fp32", "ue8m0")]
    assert ["exported in FP8 with --power-of-two-scales" in card for card in cards] == [False, True]


def test_layers_that_are_left_out_of_fp8_are_listed_with_the_run(tmp_path, capsys):
    metrics = trained(tmp_path, train={"max_steps": 2, "use_fp8": True})
    listed = json.loads((tmp_path / "results" / "run.json").read_text())["env"]["high_precision_linears"]
    assert "lm_head" in listed
    assert "high_precision_linears" not in metrics  # DVC's metrics are numbers and words
    assert f"in high precision: {listed[0].removeprefix('model.')}" in capsys.readouterr().err


def test_a_model_without_experts_trains(tmp_path):
    dense = {"first_k_dense_replace": 9, "num_nextn_predict_layers": 0}
    metrics = trained(tmp_path, architecture=dense, train={"max_steps": 12, "eval_steps": 4})
    names, first, *_ = (line.split("\t") for line in (tmp_path / "results" / "validation.tsv").read_text().splitlines())
    assert metrics["validation"]["loss"] < float(first[names.index("loss")]) - 0.05
    assert (tmp_path / "results" / "router.tsv").read_text().count("\n") == 1


def test_it_must_go_on_only_where_there_is_something_to_go_on_from(tmp_path):
    with pytest.raises(UserError, match=r"runtime\.resume is must; no checkpoint in"):
        trained(tmp_path, runtime={"resume": "must"})


@pytest.mark.parametrize(("resume", "first_step"), [("auto", 8), ("must", 8), ("never", 1)])
def test_resume_decides_whether_a_checkpoint_is_used(tmp_path, monkeypatch, resume, first_step):
    with monkeypatch.context() as patch:
        interrupted_after(patch, step=6)
        with pytest.raises(Interrupted):
            trained(tmp_path)
    steps: list[int] = []
    original = session.train

    def remembered(run: Run, *arguments: Any) -> None:
        steps.append(run.state.step + 1)
        original(run, *arguments)

    monkeypatch.setattr(session, "train", remembered)
    metrics = trained(tmp_path, runtime={"resume": resume})
    assert steps == [first_step]
    assert metrics["step"] == 12


def interrupted_at_seven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **train: Any) -> str:
    """Leave the checkpoint of an interrupted training; return its path from the root."""
    with monkeypatch.context() as patch:
        interrupted_after(patch, step=6)
        with pytest.raises(Interrupted):
            trained(tmp_path, train=train)
    (folder,) = (tmp_path / ".checkpoints").glob("*/step_7")
    return str(folder.relative_to(tmp_path))


@pytest.mark.parametrize("was_fp8", [True, False])
def test_a_training_goes_on_in_another_precision_from_the_master_weights(tmp_path, monkeypatch, was_fp8):
    wide = {"hidden_size": 128, "moe_intermediate_size": 128}  # a layer narrower than a block stays as it is
    source = tmp_path / "source"
    with monkeypatch.context() as patch:
        interrupted_after(patch, step=6)
        with pytest.raises(Interrupted):
            trained(source, train={"use_fp8": was_fp8}, architecture=wide)
    (folder,) = (tmp_path / ".checkpoints").glob("*/step_7")
    weights: list[dict[str, torch.Tensor]] = []
    original = session.train

    def remembered(run: Run, *arguments: Any) -> None:
        weights.append({name: tensor.clone() for name, tensor in run.model.state_dict().items()})
        original(run, *arguments)

    monkeypatch.setattr(session, "train", remembered)
    other = {"use_fp8": not was_fp8, "resume_from_checkpoint": str(folder.relative_to(tmp_path))}
    metrics = trained(tmp_path / "other", train=other, architecture=wide)
    assert metrics["step"] == 12
    assert metrics["precision"] == ("fp32" if was_fp8 else "fp8_emulated")
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in saved.items())
    steps = [line.split()[0] for line in (tmp_path / "other/results/history.tsv").read_text().splitlines()[1:]]
    assert steps == ["2", "4", "6", "8", "10", "12"]
    assert folder.is_dir()  # it is the other training's, which may still go on


def test_checkpoints_of_another_training_are_named_in_one_line_with_what_differs(tmp_path, monkeypatch, capsys):
    name = interrupted_at_seven(tmp_path, monkeypatch)
    capsys.readouterr()
    metrics = trained(tmp_path, train={"learning_rate": 0.02}, architecture={"initializer_range": 0.01})
    assert metrics["step"] == 12  # from the start, and no error
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not resumed")]
    reasons = (
        "architecture.initializer_range is 0.02 there and 0.01 here, train.learning_rate is 0.01 there and 0.02 here"
    )
    assert lines == [
        f"not resumed, of another training: {name} ({reasons}); train.resume_from_checkpoint would start from one"
    ]
    assert (tmp_path / name).is_dir()
    with pytest.raises(UserError, match=f"runtime.resume is must; .*not resumed, of another training: {name} "):
        trained(tmp_path, train={"learning_rate": 0.02}, runtime={"resume": "must"})


def test_a_training_that_saves_nothing_leaves_only_its_lock_behind(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        trained(tmp_path, train={"max_steps": 2}, runtime={"resume": "must"})
    assert [path.name for path in (tmp_path / ".checkpoints").iterdir()] == ["locks"]


def test_going_on_from_a_named_checkpoint_equals_going_on(tmp_path, monkeypatch):
    name = interrupted_at_seven(tmp_path, monkeypatch)
    metrics = trained(tmp_path / "rest", train={"resume_from_checkpoint": name})
    whole = trained(tmp_path / "whole", runtime={"resume": "never"})
    assert metrics["validation"] == whole["validation"]


def test_a_training_that_goes_on_from_another_exports_its_own_best_weights(tmp_path, monkeypatch):
    """Those of the other lie in a folder that is not this training's, even where they were better."""
    best = {"load_best_model_at_end": True, "eval_steps": 2}
    name = interrupted_at_seven(tmp_path, monkeypatch, **best)
    away = {"learning_rate": 1.0, "weight_decay": 0.0}
    metrics = trained(tmp_path / "rest", train={**best, "resume_from_checkpoint": name, **away})
    assert 8 <= metrics["exported_step"] <= 12
    assert metrics["validation"]["best_step"] == metrics["exported_step"]


def test_the_loss_that_is_told_is_that_of_the_weights_that_are_exported(tmp_path, capsys):
    train = {"load_best_model_at_end": True, "eval_steps": 2, "learning_rate": 1.0, "weight_decay": 0.0}
    metrics = trained(tmp_path, train=train)
    rows = [line.split("\t") for line in (tmp_path / "results" / "validation.tsv").read_text().splitlines()]
    losses = {int(row[0]): float(row[rows[0].index("loss")]) for row in rows[1:]}
    best = min(losses, key=losses.__getitem__)
    assert best != max(losses), "the training was to become worse"
    assert (metrics["exported_step"], metrics["validation"]["loss"]) == (best, pytest.approx(losses[best]))
    headline = json.loads((tmp_path / "results" / "headline.json").read_text())
    assert headline["val_loss"] == pytest.approx(losses[best])
    assert f"step {best}, validation {losses[best]:.4f} nats/token" in capsys.readouterr().out


EVEN = {
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "bias_freeze_ratio": 0.0,
    "mtp_loss_weight": 0.1,
    "mtp_loss_weight_final": 0.1,
}
"""Schedules that do not depend on the length of the training."""


def test_the_last_checkpoint_is_kept_on_request_and_a_longer_training_goes_on_from_it(tmp_path, capsys):
    whole = trained(tmp_path / "whole", train={**EVEN, "max_steps": 16})
    keeps = {"keep_last_checkpoint": True}
    trained(tmp_path / "first", train={**EVEN, "max_steps": 12}, runtime=keeps)
    (last,) = (tmp_path / ".checkpoints").glob("[!l]*/*_*")
    assert last.name == "step_12"
    told = capsys.readouterr().out
    assert f"kept {last} (" in told and "MB): a longer training goes on from it" in told
    longer = {**EVEN, "max_steps": 16, "resume_from_checkpoint": str(last.relative_to(tmp_path))}
    metrics = trained(tmp_path / "longer", train=longer)
    assert (metrics["step"], metrics["validation"]) == (16, whole["validation"])
    files = [tmp_path / name / "final_model" / "model.safetensors" for name in ("whole", "longer")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert last.is_dir()


@pytest.fixture
def started_at(monkeypatch) -> list[int]:
    """The step from which each training starts."""
    steps: list[int] = []
    original = session.train
    monkeypatch.setattr(session, "train", lambda run, *rest: (steps.append(run.state.step), original(run, *rest)))
    return steps


@pytest.mark.parametrize("keeps", [False, True])
def test_a_finished_training_that_is_started_again_writes_the_same_and_trains_nothing(
    tmp_path, started_at, capsys, keeps
):
    best = {"load_best_model_at_end": True, "eval_steps": 5, "learning_rate": 0.5}
    first = trained(tmp_path, train=best, runtime={"keep_last_checkpoint": keeps})
    (folder,) = (tmp_path / ".checkpoints").glob("[!l]*")
    kept = {"facts.json", "step_12", f"best_{first['exported_step']}"}
    assert {path.name for path in folder.iterdir()} == kept
    outputs = [*(tmp_path / "results").glob("*.tsv"), tmp_path / "final_model" / "model.safetensors"]
    before = [path.read_bytes() for path in outputs]
    for name in ("results", "final_model"):
        shutil.rmtree(tmp_path / name)  # as DVC does before it runs a stage
    capsys.readouterr()
    second = trained(tmp_path, train=best)
    assert started_at == [0, 12]
    assert second == first
    assert [path.read_bytes() for path in outputs] == before
    assert {path.name for path in folder.iterdir()} == kept  # DVC may fail a second time
    told = capsys.readouterr().out
    assert "finished already: exported again from its last checkpoint" in told
    assert "until another training begins; should DVC fail now, dvc repro exports from it and trains nothing" in told


def test_only_one_finished_trainings_checkpoint_is_kept_and_it_is_no_start_for_others(tmp_path, started_at, capsys):
    trained(tmp_path)
    trained(tmp_path, train={"learning_rate": 0.02})
    (left,) = (tmp_path / ".checkpoints").glob("[!l]*")
    assert left.name == fingerprint_of(tmp_path, train={"learning_rate": 0.02})
    assert "of another training" not in capsys.readouterr().out
    trained(tmp_path)
    assert started_at == [0, 0, 0]


def test_a_finished_training_is_trained_anew_where_that_is_wanted(tmp_path, started_at):
    first = trained(tmp_path)
    second = trained(tmp_path, runtime={"resume": "never"})
    assert started_at == [0, 0]
    assert first["validation"] == second["validation"]


def test_a_finished_trainings_checkpoint_stays_while_another_starts_from_it(tmp_path):
    trained(tmp_path / "first", train={**EVEN, "max_steps": 12})
    (last,) = (tmp_path / ".checkpoints").glob("*/step_12")
    named = {**EVEN, "max_steps": 16, "resume_from_checkpoint": str(last.relative_to(tmp_path))}
    assert trained(tmp_path / "longer", train=named)["step"] == 16
    assert last.is_dir()


def test_tables_are_whole_at_the_end_although_something_deleted_them_meanwhile(tmp_path, monkeypatch):
    """DVC does, where it starts a stage while an orphan of another DVC still runs it."""
    trained(tmp_path / "whole")
    log_curves = hooks.log_curves

    def deleting(run: Run, *arguments: Any) -> None:
        log_curves(run, *arguments)
        if run.state.step == 12:
            shutil.rmtree(tmp_path / "results", ignore_errors=True)

    monkeypatch.setattr(hooks, "log_curves", deleting)
    trained(tmp_path, runtime={"resume": "never"})
    tables = [sorted((tmp_path / name / "results").glob("*.tsv")) for name in ("whole", ".")]
    assert [path.name for path in tables[0]] == [path.name for path in tables[1]]
    for whole, path in zip(*tables, strict=True):
        assert [line.split()[:2] for line in path.read_text().splitlines()] == [
            line.split()[:2] for line in whole.read_text().splitlines()
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"resume_from_checkpoint": "nowhere"}}, "nowhere; holds no complete checkpoint"),
        ({"architecture": {"kv_lora_rank": 8}}, r"of another architecture \(kv_lora_rank \d+ instead of 8\)"),
        ({"train": {"max_steps": 7}}, "must be before step 7, the last"),
        ({"train": {"optim": "adamw"}}, "keep train.optim as it was"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(tmp_path, monkeypatch, change, message):
    name = interrupted_at_seven(tmp_path, monkeypatch)
    train = {"resume_from_checkpoint": name, **change.pop("train", {})}
    with pytest.raises(UserError, match=message) as refused:
        trained(tmp_path / "other", train=train, **change)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tensor", ["lm_head.weight", "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_a_named_checkpoint_with_a_number_that_is_not_finite_is_no_start(tmp_path, monkeypatch, tensor):
    name = interrupted_at_seven(tmp_path, monkeypatch)
    weights, complete = (tmp_path / name / file for file in ("model.safetensors", "complete"))
    tensors = load_file(weights)
    tensors[tensor].view(-1)[0] = math.nan
    save_file(tensors, weights)
    stated = json.loads(complete.read_text())
    stated["files"]["model.safetensors"] = file_content(weights).model_dump()
    complete.write_text(json.dumps(stated))
    match = f"train.resume_from_checkpoint is .*step_7; {tensor} holds a number that is not finite; name an earlier"
    with pytest.raises(UserError, match=match):
        trained(tmp_path / "other", train={"resume_from_checkpoint": name})


def test_the_home_folder_may_stand_in_the_name_of_a_checkpoint(tmp_path, monkeypatch, started_at):
    name = interrupted_at_seven(tmp_path, monkeypatch)
    started_at.clear()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "other"))
    trained(tmp_path / "other", train={"resume_from_checkpoint": f"~/{name}"})
    assert started_at == [7]


def test_a_training_begins_by_removing_what_killed_ones_have_left_of_their_checkpoints(tmp_path, capsys):
    ended = subprocess.Popen(["true"])
    ended.wait()
    other = tmp_path / ".checkpoints" / ("0" * 16)
    left, kept = (temporary_name(other / "step_3", process) for process in (ended.pid, os.getpid()))
    for folder in (left, kept):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    trained(tmp_path, train={"max_steps": 2})
    assert (left.exists(), kept.exists()) == (False, True)
    assert f"removed what killed processes have left: {left} (" in capsys.readouterr().out


def test_no_more_checkpoints_are_kept_than_asked_for(tmp_path, monkeypatch):
    interrupted_after(monkeypatch, step=6)
    with pytest.raises(Interrupted):
        trained(tmp_path, runtime={"save_steps": 1, "save_total_limit": 2})
    (directory,) = (tmp_path / ".checkpoints").glob("[!l]*")
    assert sorted(path.name for path in directory.iterdir()) == ["facts.json", "step_6", "step_7"]


def test_a_checkpoint_that_finds_no_room_costs_a_line_and_not_the_training(tmp_path, monkeypatch, capsys):
    save_checkpoint, full = hooks.save_checkpoint, {5}

    def writing(directory: Path, model: Any, optimizer: Any, config: Any, state: dict[str, Any], *rest: Any) -> None:
        if state["step"] in full:
            raise DiskFull("the disk is full")
        save_checkpoint(directory, model, optimizer, config, state, *rest)

    monkeypatch.setattr(hooks, "save_checkpoint", writing)
    first = trained(tmp_path)
    assert "step 5: not saved, the training goes on: the disk is full" in capsys.readouterr().out
    full |= {12}
    with pytest.raises(DiskFull):  # nothing could be exported again then
        trained(tmp_path, runtime={"resume": "never"})
    full.clear()
    assert trained(tmp_path)["validation"] == first["validation"]


def poisoned(tmp_path, monkeypatch, value: float, match: str) -> list[str]:
    """Put `value` into a weight after step 4, which ends the training; return the names that are left of it."""

    def poison(run: Run, *_: Any) -> None:
        if run.state.step == 4:
            with torch.no_grad():
                run.model.lm_head.weight.fill_(value)

    monkeypatch.setattr(hooks, "log_curves", poison)
    with pytest.raises(UserError, match=match):
        trained(tmp_path, runtime={"save_steps": 2})
    assert not (tmp_path / "final_model").exists()
    (directory,) = (tmp_path / ".checkpoints").glob("[!l]*")
    return sorted(path.name for path in directory.iterdir())


def test_a_diverged_training_saves_what_reproduces_it(tmp_path, monkeypatch):
    names = poisoned(tmp_path, monkeypatch, 3.0e38, "step 4: loss is .*; must be finite")
    assert names == ["facts.json", "step_2", "step_4"]


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(tmp_path, monkeypatch):
    names = poisoned(tmp_path, monkeypatch, math.inf, "step 4: lm_head.weight holds a number that is not finite")
    assert names == ["facts.json", "step_2"]


def test_a_validation_that_alone_is_not_finite_ends_the_training_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "summed_loss", lambda *_: math.inf)
    with pytest.raises(
        UserError, match="step 5: validation loss is inf; must be finite; the last checkpoint stays"
    ) as told:
        trained(tmp_path, runtime={"save_steps": 2})
    assert "\n" not in str(told.value)
    assert not (tmp_path / "final_model").exists()
    assert {path.name for path in (tmp_path / "results").iterdir()} <= {f"{table}.tsv" for table in TABLES}
    (last,) = (tmp_path / ".checkpoints").glob("[!l]*/step_4")
    assert damage_of(last) == ""
    monkeypatch.undo()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert trained(tmp_path, runtime={"resume": "must"})["step"] == 12


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"learning_rate": 0.011}},
        {"train": {"max_steps": 13}},
        {"train": {"precision": "bf16"}},
        {"train": {"experts": "reference"}},
        {"architecture": {"initializer_range": 0.01}},
        {"seed": 5},
    ],
)
def test_whatever_shapes_the_weights_is_in_the_fingerprint(tmp_path, change):
    assert fingerprint_of(tmp_path, **change) != fingerprint_of(tmp_path)


@pytest.mark.parametrize("change", [{"save_steps": 7}, {"logging_steps": 3}, {"dataloader_num_workers": 1}])
def test_what_only_the_machine_is_concerned_with_is_not_in_the_fingerprint(tmp_path, change):
    assert fingerprint_of(tmp_path, runtime=change) == fingerprint_of(tmp_path)


def test_a_large_vocabulary_gets_the_chunked_loss_and_trains_to_the_same_loss(tmp_path, monkeypatch):
    plain = trained(tmp_path / "plain", train={"max_steps": 3})
    monkeypatch.setattr("dsv3.sizing.chunked_loss.MIN_LOGITS_BYTES", 1000)
    chunked = trained(tmp_path / "chunked", train={"max_steps": 3})
    assert (plain["cross_entropy"], chunked["cross_entropy"]) == ("plain", "chunked")
    # The same sums in another order, three steps long.
    assert chunked["validation"]["loss"] == pytest.approx(plain["validation"]["loss"], rel=1e-5)


def test_bf16_trains_to_nearly_the_same_loss(tmp_path):
    losses = [
        trained(tmp_path / precision, train={"precision": precision, "max_steps": 8})["validation"]["loss"]
        for precision in ("fp32", "bf16")
    ]
    assert losses[0] != losses[1]
    # bf16 keeps 8 bits: 0.4 % per number, averaging out over some thousands of them.
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_a_launch_that_would_shard_the_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3.training.setup.LAUNCHED", ())
    with pytest.raises(UserError, match="must be one of its plain launches"):
        trained(tmp_path)


def test_more_processes_than_the_accumulation_can_be_dealt_to_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 3)
    with pytest.raises(UserError, match="batch_ramp_levels is 2; must be a multiple of the 3 processes"):
        trained(tmp_path)


def test_every_checkpoint_goes_to_the_background_that_the_parameters_ask_for(tmp_path, monkeypatch):
    """Without its thread, which needs shards: what is handed over, and that older ones go when it is waited for."""
    seen, save_checkpoint = [], hooks.save_checkpoint
    background = SimpleNamespace(wait=lambda: None, afterwards=lambda finish: (seen.append("begun"), finish()))

    def writing(runtime: Any) -> Any:
        seen.append(runtime.save_steps)
        return nullcontext(background)

    def save(*arguments: Any) -> None:
        assert arguments[-1] is background
        save_checkpoint(*arguments[:-1])

    monkeypatch.setattr(session, "background_writing", writing)
    monkeypatch.setattr(hooks, "save_checkpoint", save)
    steps = trained(tmp_path, runtime={"save_steps": 3, "save_total_limit": 1, "keep_last_checkpoint": True})["step"]
    assert seen == [3, *["begun"] * math.ceil(steps / 3)]


def test_the_progress_of_a_step_that_validates_shows_that_validation(tmp_path, capsys):
    """12 steps, validated every fifth and at the end; a program reads one state a step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    outputs = Outputs(tmp_path / "tokens", tmp_path / "final_model", tmp_path / "results", {"source": "made up"})
    run_training(plan_of(tmp_path), outputs, ProgressMode.json)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    states = {line["done"]: line.get("val") for line in lines if "done" in line}
    validations = {line["step"]: line["loss"] for line in lines if "best_step" in line}
    assert set(validations) == {5, 10, 12} and set(states) == set(range(1, 13))
    assert {step: states[step] for step in validations} == validations
    assert states[4] is None and states[7] == validations[5]

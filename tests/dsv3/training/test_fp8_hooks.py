import csv
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsv3.training import fp8_hooks, loop
from dsv3.training.fp8_hooks import log_fp8, measure_fp8, preserve_training_state
from dsv3.training.loop import accumulate_gradients, train
from dsv3.training.schedule import mtp_loss_weight
from dsv3.training.session import Outputs, run_training
from tests.training_inputs import WIDE, plan_of, started_run

SECTIONS: dict[str, Any] = {"architecture": {**WIDE, "attention_dropout": 0.1}}
TRAIN = {"use_fp8": True, "max_steps": 4, "eval_steps": 2}


@pytest.fixture(autouse=True)
def own_root(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


class Rows:
    """As much of a recorder as the hook calls."""

    def __init__(self):
        self.rows = []

    def log(self, table, row):
        assert table == "fp8"
        self.rows.append(row)


def num_forward_hooks(run):
    return sum(len(module._forward_hooks) for module in run.model.modules())


def trained(folder, **train_params):
    """Train as the stage does; return the exported weights and the rows of fp8.tsv."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    runtime = {"resume": "never"}  # the same training in another folder would export from the first one's checkpoint
    plan = plan_of(folder, **SECTIONS, train={**TRAIN, **train_params}, runtime=runtime)
    run_training(plan, Outputs(folder / "tokens", folder / "final_model", folder / "results", {"source": "made up"}))
    with (folder / "results" / "fp8.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return load_file(folder / "final_model" / "model.safetensors"), rows


def test_a_training_that_is_measured_ends_with_the_same_bits(tmp_path, monkeypatch):
    weights, rows = trained(tmp_path / "measured", eval_steps=1)
    monkeypatch.setattr(fp8_hooks, "log_fp8", lambda run, recorder: None)
    unmeasured, no_rows = trained(tmp_path / "unmeasured", eval_steps=1)
    assert {row["step"] for row in rows} == {"1", "2", "3", "4"}
    assert no_rows == []
    assert all(torch.equal(weights[name], unmeasured[name]) for name in unmeasured)


def test_every_module_and_operand_has_a_row_and_so_have_all_of_them_together(tmp_path):
    _, rows = trained(tmp_path, max_steps=2)
    some = {f"model.layers.{name}" for name in ("0.self_attn.o_proj", "1.mlp.experts", "2.eh_proj")}
    assert {"model", *some} <= {row["module"] for row in rows}
    together = {row["operand"]: row for row in rows if row["module"] == "model"}
    assert set(together) == {"input", "gradient", "weight"}
    for row in rows:
        assert 0.01 < float(row["relative_error"]) < 0.05
        assert (row["nonzero_grad_share"] != "") == (row["operand"] in ("weight", "gate_up", "down"))
    assert float(together["weight"]["nonzero_grad_share"]) > 0.99


def test_without_fp8_the_table_has_a_header_and_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_hooks, "log_fp8", None)
    _, rows = trained(tmp_path, use_fp8=False, max_steps=2)
    assert rows == []
    assert (tmp_path / "results" / "fp8.tsv").read_text() == "step\tmodule\toperand\n"


@pytest.mark.parametrize("change", [{}, {"gradient_checkpointing": True}, {"precision": "bf16"}], ids=str)
def test_the_measurement_leaves_nothing_behind_and_is_a_function_of_the_step(tmp_path, change):
    run = started_run(tmp_path, **SECTIONS, train={**TRAIN, **change})
    train(run, [], lambda run: None)
    run.model.routers()[0][1].expert_load.fill_(7)
    loads = [router.expert_load.clone() for _, router in run.model.routers()]
    state, num_hooks = torch.get_rng_state(), num_forward_hooks(run)
    first = measure_fp8(run)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(loads, (r.expert_load for _, r in run.model.routers()), strict=True))
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert num_forward_hooks(run) == num_hooks
    torch.rand(3)
    assert measure_fp8(run) == first


def test_the_micro_batch_is_the_first_of_the_step_just_done(tmp_path, monkeypatch):
    run = started_run(tmp_path, **SECTIONS, train=TRAIN)
    batches, seen = list(run.micro_batches()), []
    run.state.step = 3
    output = fp8_hooks.micro_batch_output

    def watched(run, forward, number, tokens, weight):
        seen.append((number, tokens))
        return output(run, forward, number, tokens, weight)

    monkeypatch.setattr(fp8_hooks, "micro_batch_output", watched)
    measure_fp8(run)
    (number, tokens), *_ = seen
    assert number == 2 * 2 and torch.equal(tokens, batches[number])


def test_the_pass_that_is_measured_has_the_trainings_own_noise_and_loss(tmp_path, monkeypatch):
    noise = {"hidden_dropout": 0.3, "token_replacement": 0.3}
    run = started_run(tmp_path, **SECTIONS, train={**TRAIN, **noise, "gradient_accumulation_steps": 1})
    losses, output = [], loop.micro_batch_output

    def watched(*arguments):
        losses.append(output(*arguments))
        return losses[-1]

    for module in (loop, fp8_hooks):
        monkeypatch.setattr(module, "micro_batch_output", watched)
    run.model.train()
    accumulate_gradients(run, run.micro_batches(), mtp_loss_weight(0, run.plan.params.train, run.plan.budget))
    run.state.step = 1
    measure_fp8(run)
    trained, *measured = [found.loss.item() for found in losses]
    assert measured and set(measured) == {trained}


def test_the_statistics_are_of_what_training_multiplies(tmp_path):
    """The gradients of the same micro-batch by the training's own function have as many zeros."""
    run = started_run(tmp_path, **SECTIONS, train={**TRAIN, "gradient_accumulation_steps": 1})
    tokens = next(run.micro_batches())
    run.state.step = 1
    found = measure_fp8(run)
    with preserve_training_state(run):
        accumulate_gradients(run, iter([tokens]), 0.3)
    gradient = run.model.get_parameter("model.layers.0.mlp.down_proj.weight").grad
    assert found["model.layers.0.mlp.down_proj"]["weight"].num_nonzero_gradients == gradient.count_nonzero()


def test_a_process_that_records_nothing_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_hooks, "measure_fp8", None)
    log_fp8(started_run(tmp_path, **SECTIONS, train=TRAIN), None)


def test_a_row_carries_its_step_module_and_operand(tmp_path):
    run, recorder = started_run(tmp_path, **SECTIONS, train=TRAIN), Rows()
    run.state.step = 1
    log_fp8(run, recorder)
    assert [list(row)[:3] for row in recorder.rows] == [["step", "module", "operand"]] * len(recorder.rows)
    assert {row["step"] for row in recorder.rows} == {1}

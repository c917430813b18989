import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from dsv3.errors import Interrupted
from dsv3.export.loading import load_model
from dsv3.progress import Progress
from dsv3.training import hooks
from dsv3.training.averaging import averaged_weights, exchange_with_averages
from dsv3.training.loop import Hook, train
from dsv3.training.optimizer import AVERAGE
from dsv3.training.session import Outputs, run_training
from tests.training_inputs import WIDE, no_save, plan_of, started_run

BETA = 0.8
"""Which beta_t reaches at step 35."""


def values_of(run) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def averages_of(run) -> dict[str, Tensor]:
    with averaged_weights(run.model, run.optimizer):
        return values_of(run)


def trained(tmp_path, name="model", *, runtime=None, architecture=None, **values):
    """Train as the stage does in this process; return the folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path / name
    plan = plan_of(folder, train=values, runtime=runtime or {}, architecture=architecture or {})
    outputs = Outputs(folder / "tokens", folder / "final_model", folder / "results", {"source": "made up"})
    run_training(plan, outputs)
    return folder


@pytest.mark.parametrize("optim", ["muon", "adamw"])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_averages_are_those_of_the_equation(tmp_path, optim, moments):
    """Recomputed in fp64 from the weights after each step."""
    values = {"optim": optim, "adam_moments_dtype": moments, "ema_decay": BETA, "max_steps": 40}
    run, seen = started_run(tmp_path, train=values), []
    train(run, [Hook(1, lambda run: seen.append(values_of(run)))], no_save)
    for name, average in averages_of(run).items():
        expected = seen[0][name].double()
        for step, weights in enumerate(seen[1:], 1):
            beta = min(BETA, (1 + step) / (10 + step))
            expected = beta * expected + (1 - beta) * weights[name].double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(average, seen[-1][name]) or not seen[-1][name].any(), name


def test_the_weights_are_those_of_a_training_without_averages(tmp_path):
    runs = [started_run(tmp_path / str(beta), train={"ema_decay": beta, "max_steps": 6}) for beta in (0.0, 0.9)]
    for run in runs:
        train(run, [], no_save)
    plain, averaged = map(values_of, runs)
    assert all(torch.equal(plain[name], averaged[name]) for name in plain)
    assert not any(AVERAGE in state for state in runs[0].optimizer.state.values())


def test_an_exchange_and_another_leave_every_bit_as_it_was(tmp_path):
    run = started_run(tmp_path, train={"ema_decay": 0.9, "max_steps": 3})
    train(run, [], no_save)
    before = values_of(run)
    exchange_with_averages(run.model, run.optimizer)
    assert any(not torch.equal(before[name], value) for name, value in values_of(run).items())
    exchange_with_averages(run.model, run.optimizer)
    assert all(torch.equal(before[name], value) for name, value in values_of(run).items())


@pytest.mark.parametrize("use_fp8", [False, True])
@pytest.mark.parametrize("best", [False, True])
def test_the_exported_model_is_the_average_and_has_the_validation_loss_that_was_told(
    tmp_path, monkeypatch, use_fp8, best
):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    validated, averages = {}, {}
    given = hooks.validate

    def validate(run, recorder, directory, progress: Progress):
        given(run, recorder, directory, progress)
        validated[run.state.step], averages[run.state.step] = run.state.validation_loss, averages_of(run)

    monkeypatch.setattr(hooks, "validate", validate)
    values = {"ema_decay": 0.8, "use_fp8": use_fp8, "load_best_model_at_end": best, "max_steps": 8, "eval_steps": 4}
    folder = trained(tmp_path, architecture=WIDE, **values)
    exported, step = load_model(folder / "final_model", torch.device("cpu")), 8
    if best:
        step = min(validated, key=validated.__getitem__)
    parameters = dict(exported.named_parameters())
    assert all(torch.equal(parameters[name], average) for name, average in averages[step].items())
    run = started_run(folder, train=values, architecture=WIDE)
    run.model.load_state_dict(exported.state_dict())
    loss = hooks.summed_validation_loss(run) / (len(run.plan.validation) - 1)
    assert loss == pytest.approx(validated[step], rel=1e-6)


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_a_training_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch, optim):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    values = {"optim": optim, "ema_decay": 0.9, "max_steps": 10}

    def stopping(run, *arguments):
        if run.state.step == 6:
            run.interruption.remember(2, None)

    whole = trained(tmp_path, "whole", **values)
    with monkeypatch.context() as patch:
        patch.setattr(hooks, "log_curves", stopping)
        with pytest.raises(Interrupted):
            trained(tmp_path, "rest", runtime={"resume": "never"}, **values)
    rest = trained(tmp_path, "rest", runtime={"resume": "must"}, **values)
    files = [folder / "final_model" / "model.safetensors" for folder in (whole, rest)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.0), (0.0, 0.9)])
def test_a_training_with_averages_goes_on_from_one_without_and_back(tmp_path, monkeypatch, before, after):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    first = trained(tmp_path, "first", runtime={"keep_last_checkpoint": True}, ema_decay=before, max_steps=4)
    (last,) = (tmp_path / ".checkpoints").glob("*/step_4")
    values = {"ema_decay": after, "max_steps": 8, "resume_from_checkpoint": str(last)}
    second = trained(tmp_path, "second", **values)
    models = [load_file(folder / "final_model" / "model.safetensors") for folder in (first, second)]
    assert any(not torch.equal(models[0][name], models[1][name]) for name in models[0])
    (last,) = (each for each in (tmp_path / ".checkpoints").glob("*/step_8"))
    kept = torch.load(last / "optimizer.pt", weights_only=True)["state"].values()
    assert {AVERAGE in state for state in kept} == {after > 0}

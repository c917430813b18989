import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn import functional as F

from dsv3.errors import Interrupted, UserError
from dsv3.export.loading import load_model
from dsv3.kernels.weight_cache import cached_weights
from dsv3.sizing.memory import training_memory
from dsv3.training import hooks
from dsv3.training.distillation import Distillation
from dsv3.training.initial_weights import check_not_replaced
from dsv3.training.loop import accumulate_gradients, micro_batch_output
from dsv3.training.session import Outputs, run_training
from dsv3.training.setup import prepare_model, run_fingerprint
from mini_model.modeling_deepseek import IGNORED_LABEL, cross_entropy
from tests.committed import DEFAULTS
from tests.dsv3.sizing.memory_probe import LiveBytes
from tests.exported_model import write_exported
from tests.training_inputs import WIDE, history, plan_of, run_stage, started_run, write_inputs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Path]:
    """Two models of new weights, of other sizes than a student's."""
    folders = []
    for width in (48, 64):
        folder = tmp_path_factory.mktemp(f"teacher{width}")
        write_exported(folder, architecture={"hidden_size": width, "num_nextn_predict_layers": 0})
        folders.append(folder / "final_model")
    return folders


def of_teachers(teachers, weight=0.5, **train):
    return {"teachers": [str(folder) for folder in teachers], "distillation_weight": weight, **train}


def expected_loss(model, teachers, tokens, weight, mtp_weight):
    """The equations of the module's essay with the teachers' mean, from whole logits and without any code of it."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    model.eval()
    state = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    embeds = model.model.embed_tokens(inputs)
    states = [state, *model.model.mtp_hidden_states(state, embeds)]
    with torch.no_grad():
        taught = torch.stack([load_model(folder, CPU)(inputs).logits.softmax(-1) for folder in teachers]).mean(0)
    losses = []
    for depth, hidden in enumerate(states):
        log = model.lm_head(hidden).log_softmax(-1)
        text = F.nll_loss(log.flatten(0, 1), targets[:, depth:].flatten())
        losses.append((1 - weight) * text - weight * (taught[:, depth:] * log).sum(-1).mean())
    return losses[0] + mtp_weight * sum(losses[1:]) / max(1, len(losses) - 1)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("depths", [0, 2])
def test_the_loss_is_that_of_the_equation_for_every_head_and_so_are_its_gradients(tmp_path, teachers, weight, depths):
    architecture = {"num_nextn_predict_layers": depths}
    train = of_teachers(teachers, weight, sequence_loss_weight=0.0, gradient_accumulation_steps=1)
    run = started_run(tmp_path, architecture=architecture, train=train)
    tokens = next(run.micro_batches())
    expected = expected_loss(run.model, teachers[:1], tokens, weight, 0.3)  # micro-batch 0 is the first teacher's
    expected.backward()
    parameters = {name: parameter for name, parameter in run.model.named_parameters() if parameter.grad is not None}
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    run.model.train().zero_grad()
    total, *text, _ = accumulate_gradients(run, run.micro_batches(), 0.3).tolist()
    assert total == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        output = run.model.eval()(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], mtp_loss_weight=0.3)
    alone = [output.cross_entropy_loss.item(), output.mtp_loss.item() if depths else 0.0]
    assert text == pytest.approx(alone, rel=1e-5)  # the text's alone is recorded
    for name, gradient in gradients.items():
        assert torch.allclose(parameters[name].grad, gradient, atol=1e-6), name


def test_the_teachers_in_turn_ask_for_what_their_mean_asks_for(tmp_path, teachers):
    train = of_teachers(teachers, 0.7, sequence_loss_weight=0.0, per_device_train_batch_size=2)
    run = started_run(tmp_path, train=train)
    tokens = next(run.micro_batches())
    expected_loss(run.model, teachers, tokens, 0.7, 0.3).backward()
    expected = {name: weight.grad.clone() for name, weight in run.model.named_parameters() if weight.grad is not None}
    run.model.zero_grad()
    first, second = (micro_batch_output(run, run.model, number, tokens, 0.3).loss / 2 for number in (4, 5))
    weights = {name: weight for name, weight in run.model.named_parameters() if name in expected}
    first.backward()
    assert not torch.allclose(2 * weights["lm_head.weight"].grad, expected["lm_head.weight"], atol=1e-6)
    second.backward()
    for name, gradient in expected.items():
        assert torch.allclose(weights[name].grad, gradient, atol=1e-6), name


def test_positions_without_a_target_teach_nothing(teachers):
    hidden, head = torch.randn(6, 8), torch.randn(272, 8)
    labels = torch.tensor([5, 6, IGNORED_LABEL, 7, IGNORED_LABEL, 8])
    taught = torch.rand(2, 3, 272).softmax(-1)
    distillation = Distillation([], 0.4, cross_entropy)
    kept = labels != IGNORED_LABEL
    with distillation.teaching(taught):
        found = distillation.cross_entropy(hidden, head, labels)
    log = (hidden @ head.T).log_softmax(-1)[kept]
    expected = 0.6 * F.nll_loss(log, labels[kept]) - 0.4 * (taught.flatten(0, 1)[kept] * log).sum(-1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation.cross_entropy(hidden, head, labels) == cross_entropy(hidden, head, labels)


def test_the_teachers_read_the_texts_tokens_and_learn_nothing(tmp_path, teachers):
    run = started_run(tmp_path, train=of_teachers(teachers, token_replacement=0.5))
    seen, own = [], run.distillation.probabilities
    run.distillation.probabilities = lambda number, tokens, positions: (
        seen.append(tokens) or own(number, tokens, positions)
    )
    before = [parameter.clone() for teacher in run.distillation.teachers for parameter in teacher.parameters()]
    accumulate_gradients(run, run.micro_batches(), 0.0)
    batches = run.micro_batches()
    assert all(torch.equal(tokens, next(batches)[:, :-1]) for tokens in seen) and len(seen) == 2
    parameters = [parameter for teacher in run.distillation.teachers for parameter in teacher.parameters()]
    assert all(torch.equal(*pair) for pair in zip(before, parameters, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    assert not any(teacher.training for teacher in run.distillation.teachers)


def test_a_student_comes_closer_to_its_teacher_than_one_of_the_text_alone(tmp_path, teachers):
    """The teacher here is random, so that nothing of the text leads to it."""

    def distance(name, **train):
        run = started_run(tmp_path / name, train={"max_steps": 30, "precision": "fp32", **train})
        history(run)
        tokens = run.plan.batches.sequences(0, 4)[:, :-1]
        with torch.no_grad():
            taught = load_model(teachers[0], CPU)(tokens).logits.softmax(-1)
            own = run.model.eval()(tokens).logits.log_softmax(-1)
        return F.kl_div(own, taught, reduction="batchmean").item() / tokens.shape[1]

    assert distance("taught", **of_teachers(teachers[:1], 1.0)) < 0.5 * distance("alone")


def test_validation_is_the_texts_own_loss(tmp_path, teachers):
    write_inputs(tmp_path, train=of_teachers(teachers, max_steps=2, learning_rate=1e-10, warmup_ratio=0.0))
    write_inputs(tmp_path / "plain", train={"max_steps": 2, "learning_rate": 1e-10, "warmup_ratio": 0.0})
    losses = []
    for folder in (tmp_path, tmp_path / "plain"):
        assert run_stage(folder).returncode == 0
        losses.append((folder / "results" / "validation.tsv").read_text().splitlines()[1].split("\t")[2])
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
    card = (tmp_path / "final_model" / "README.md").read_text()
    assert f"| teachers | {teachers[0]}, SHA-256 " in card and f"; {teachers[1]}, SHA-256 " in card


def test_other_teachers_are_another_training(tmp_path, teachers):
    def digest(**train):
        plan = plan_of(tmp_path, train=train)
        return run_fingerprint(plan, prepare_model(plan, CPU)[1])

    both, one = digest(**of_teachers(teachers)), digest(**of_teachers(teachers[:1]))
    assert len({both.digest, one.digest, digest().digest}) == 3
    assert "the weights of train.teachers are others" in both.differences(one.facts)


def refused(folder, **sections):
    with pytest.raises(UserError) as caught:
        plan_of(folder, **sections)
    return str(caught.value)


def test_a_teacher_that_does_not_fit_is_one_line(tmp_path, teachers):
    assert refused(tmp_path, train={"teachers": ["nowhere/model"]}).startswith("train.teachers names nowhere/model; ")
    other = {"vocab_size": 300}
    line = refused(tmp_path, train=of_teachers(teachers), architecture=other)
    assert line == f"train.teachers names {teachers[0]}; its vocab_size is 272; must be 300, the model's"
    line = refused(tmp_path, train=of_teachers(teachers, block_size=128), architecture={"max_position_embeddings": 128})
    assert line.endswith("; its max_position_embeddings is 64; must be >= 128, train.block_size")
    for name in ("", "a\0b", "a" * 5000):
        assert "params.yaml: train.teachers.0" in refused(tmp_path, train={"teachers": [name]})
    damaged = Path(shutil.copytree(teachers[0], tmp_path / "damaged"))
    content = (damaged / "tokenizer.json").read_text().replace('"Ġ": ', '"Ġx": ', 1)
    assert content != (damaged / "tokenizer.json").read_text()
    (damaged / "tokenizer.json").write_text(content)
    (damaged / "SHA256SUMS").unlink(missing_ok=True)
    assert "tokenizer.json is not that of" in refused(tmp_path, train=of_teachers([damaged]))
    assert "must be false with teachers" in refused(tmp_path, train=of_teachers(teachers, torch_compile=True))


def test_a_teacher_is_not_the_trainings_own_output(tmp_path):
    train = DEFAULTS.train.model_copy(update={"teachers": ["a", str(tmp_path / "final_model")]})
    with pytest.raises(UserError, match=r"train\.teachers\[1\] is .*; is this training's own output"):
        check_not_replaced(train, tmp_path / "final_model")


def test_the_plan_names_the_teachers(tmp_path, teachers):
    lines = plan_of(tmp_path, train=of_teachers(teachers)).summary().splitlines()
    assert [line.split(", SHA-256 ")[0] for line in lines if line.startswith("teacher")] == [
        f"teacher  {folder}" for folder in teachers
    ]


def test_a_student_that_was_stopped_goes_on_to_the_same_bits(tmp_path, teachers, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    train = of_teachers(teachers, max_steps=10, hidden_dropout=0.1, token_replacement=0.1)

    def trained(name, **runtime):
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path / name
        outputs = Outputs(folder / "tokens", folder / "final_model", folder / "results", {"source": "made up"})
        run_training(plan_of(folder, train=train, runtime=runtime), outputs)

    def stopping(run, *arguments):
        if run.state.step == 6:
            run.interruption.remember(2, None)

    trained("whole")
    with monkeypatch.context() as patch:
        patch.setattr(hooks, "log_curves", stopping)
        with pytest.raises(Interrupted):
            trained("rest", resume="never")
    trained("rest", resume="must")
    files = [tmp_path / name / "final_model" / "model.safetensors" for name in ("whole", "rest")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_teachers_and_what_they_say_are_in_the_estimate(tmp_path):
    """The peak of a forward and backward pass with teachers of the student's own size."""
    write_exported(tmp_path / "teacher", architecture=WIDE)
    train = of_teachers([tmp_path / "teacher" / "final_model"] * 2, gradient_accumulation_steps=1)
    run = started_run(tmp_path / "student", architecture=WIDE, train=train)
    everything = [run.model, *run.distillation.teachers]
    held = [tensor for model in everything for tensor in (*model.parameters(), *model.buffers())]
    run.model.train()
    with LiveBytes(held) as memory_in_use, cached_weights(run.model):
        accumulate_gradients(run, run.micro_batches(), 0.3)
    estimate = training_memory(run.plan.architecture, run.plan.params.train, "cpu")
    expected = estimate.weights_bytes + estimate.teachers_bytes + estimate.pass_bytes
    assert estimate.teachers_bytes == pytest.approx(2 * estimate.weights_bytes, rel=0.01)
    assert expected == pytest.approx(memory_in_use.peak, rel=0.1)

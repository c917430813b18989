from dataclasses import replace

import pytest
import torch

from dsv3.training.loop import accumulate_gradients
from dsv3.training.regularization import TokenReplacement, drop_hidden
from dsv3.training.setup import prepare_model
from tests.training_inputs import history, plan_of, started_run

CPU = torch.device("cpu")
BOS = 3
TOKENS = torch.randint(0, 50, (8, 500), generator=torch.Generator().manual_seed(0))


def replaced(share, number=5, tokens=TOKENS, seed=1):
    return TokenReplacement(share, vocab_size=50, bos_token_id=BOS, seed=seed).of_micro_batch(number, tokens)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_share_of_tokens_that_is_asked_for_is_random_and_documents_keep_their_borders(share):
    found = replaced(share)
    others = TOKENS != BOS
    changed = (found != TOKENS)[others].float().mean().item()
    expected, count = share * 48 / 49, int(others.sum())  # one in 49 draws the token that was there
    assert abs(changed - expected) < 4 * (expected * (1 - expected) / count) ** 0.5
    assert torch.equal(found == BOS, TOKENS == BOS)
    drawn = found[found != TOKENS].bincount(minlength=50)
    assert drawn[BOS] == 0 and found.max() < 50
    if share == 0.5:
        assert (drawn > 0).sum() == 49


def test_no_share_changes_nothing_and_costs_no_copy():
    assert replaced(0.0) is TOKENS


def test_each_micro_batch_of_each_seed_has_masks_of_its_own_that_can_be_drawn_again():
    first = replaced(0.2)
    assert torch.equal(first, replaced(0.2))
    assert not torch.equal(first, replaced(0.2, number=6))
    assert not torch.equal(first, replaced(0.2, seed=2))


def read_by_the_model(run):
    """Return the input ids and targets of each forward pass of the run's next step."""
    seen, forward = [], run.forward

    def watched(**arguments):
        seen.append((arguments["input_ids"], arguments["shift_labels"]))
        return forward(**arguments)

    run.forward = watched
    accumulate_gradients(run, run.micro_batches(), 0.0)
    return seen


def test_a_training_reads_replaced_tokens_and_predicts_the_texts_own(tmp_path):
    plain = read_by_the_model(started_run(tmp_path / "a"))
    noisy = read_by_the_model(started_run(tmp_path / "b", train={"token_replacement": 0.3}))
    assert len(plain) == len(noisy) == 2
    for (own, targets), (changed, same) in zip(plain, noisy, strict=True):
        assert torch.equal(targets, same)
        assert 0.1 < (own != changed).float().mean() < 0.5
    differences = [(own != changed) for (own, _), (changed, _) in zip(plain, noisy, strict=True)]
    assert not torch.equal(*differences)


def test_the_number_of_processes_does_not_change_which_tokens_are_replaced(tmp_path):
    noise = {"token_replacement": 0.3}
    alone = read_by_the_model(started_run(tmp_path / "a", train=noise))
    second = started_run(tmp_path / "b", train=noise)
    second.layout = replace(second.layout, rank=1, world_size=2)
    (own,) = read_by_the_model(second)
    assert torch.equal(own[0], alone[1][0])


def test_the_number_of_processes_does_not_change_what_is_dropped(tmp_path):
    """The losses of a step's micro-batches are the same whoever computes them."""
    noise = {"hidden_dropout": 0.3, "token_replacement": 0.3}
    alone = started_run(tmp_path / "a", train=noise)
    whole = accumulate_gradients(alone, alone.micro_batches(), 0.3)
    parts = []
    for rank in (0, 1):
        run = started_run(tmp_path / str(rank), train=noise)
        run.layout = replace(run.layout, rank=rank, world_size=2)
        parts.append(accumulate_gradients(run, run.micro_batches(), 0.3))
    assert not torch.equal(parts[0], parts[1])
    assert torch.equal(sum(parts), whole)


def outputs(model, is_training):
    model.train(is_training)
    torch.manual_seed(0)
    return model(input_ids=torch.arange(16)[None]).logits


def test_dropout_zeroes_its_share_of_what_each_sublayer_adds_and_only_in_training(tmp_path):
    model, _ = prepare_model(plan_of(tmp_path), CPU)
    before = outputs(model, True), outputs(model, False)
    drop_hidden(model, 0.25)
    assert torch.equal(outputs(model, False), before[1])
    assert not torch.equal(outputs(model, True), before[0])
    added = {}

    def remember(module, inputs, output):
        added[module] = output if isinstance(output, torch.Tensor) else output[0]

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(remember)
        layer.mlp.register_forward_hook(remember)
    model.train()(input_ids=torch.arange(64).repeat(4, 1), shift_labels=torch.zeros(4, 64, dtype=torch.int64),
                  mtp_loss_weight=0.1)  # fmt: skip
    assert len(added) == 2 * len(model.model.layers) == 6  # the MTP module's too
    for values in added.values():
        assert abs((values == 0).float().mean().item() - 0.25) < 0.02


def test_dropout_keeps_the_mean_of_what_is_added(tmp_path):
    model, _ = prepare_model(plan_of(tmp_path, train={"hidden_dropout": 0.5}), CPU)
    layer = model.model.layers[0]
    x = torch.randn(1, 4, 32)
    kept = layer.eval().mlp(x)
    layer.train()
    mean = torch.stack([layer.mlp(x) for _ in range(4000)]).mean(dim=0)
    assert torch.allclose(mean, kept, atol=0.1 * kept.abs().max().item())


@pytest.mark.parametrize("train", [{"hidden_dropout": 0.2}, {"token_replacement": 0.2}], ids=str)
def test_noise_changes_what_is_learnt_and_is_the_same_each_time(tmp_path, train):
    def losses(name, **changes):
        return [row["loss"] for row in history(started_run(tmp_path / name, train={"max_steps": 3, **changes}))]

    assert losses("a", **train) == losses("b", **train) != losses("c")


def test_a_recomputed_layer_drops_the_same_numbers(tmp_path):
    """Its gradients would else be those of another network."""
    seen = []
    for checkpoints in (False, True):
        train = {"hidden_dropout": 0.3, "max_steps": 3, "gradient_checkpointing": checkpoints}
        seen.append([row["grad_norm"] for row in history(started_run(tmp_path / str(checkpoints), train=train))])
    assert seen[0] == seen[1]

import math
import signal
from itertools import pairwise

import pytest
import torch

from dsv3.errors import Interrupted, UserError
from dsv3.evaluation.load_balance import max_vio
from dsv3.training.hooks import history_row
from dsv3.training.loop import Hook, Run, train
from dsv3.training.state import StepSums
from tests.training_inputs import history, no_save, started_run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def test_a_training_learns(tmp_path):
    rows = history(started_run(tmp_path, train={"max_steps": 30}))
    assert rows[0]["loss"] == pytest.approx(math.log(272), rel=0.01)  # at first every token is as likely
    assert rows[-1]["loss"] < 3.2


@pytest.mark.parametrize("seed", [0, 20261128063000, 2**63 - 1])
def test_every_seed_that_is_accepted_trains(tmp_path, seed):
    assert len(history(started_run(tmp_path, seed=seed, train={"max_steps": 1, "hidden_dropout": 0.1}))) == 1


def test_the_modules_loss_is_recorded_where_they_are_trained(tmp_path):
    """They are from the start to 67.6 % of the steps; a row that reaches beyond holds no mean over both."""
    run = started_run(tmp_path, train={"max_steps": 9, "mtp_loss_weight": 0.3, "mtp_loss_weight_final": 0.0})
    rows = []

    def log(run: Run) -> None:
        sums, run.state.step_sums = run.state.step_sums, StepSums()
        rows.append(history_row(run, sums))

    train(run, [Hook(4, log)], no_save)
    assert [(row["step"], row["mtp_loss_weight"], "mtp_loss" in row) for row in rows] == [
        (4, 0.3, True),
        (8, 0.0, False),
        (9, 0.0, False),
    ]
    assert rows[0]["mtp_loss"] > 1


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (1, 4)])
def test_how_the_batch_is_cut_into_forward_passes_changes_no_more_than_rounding(tmp_path, batch_size, accumulation):
    cut = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    whole, other = started_run(tmp_path / "a"), started_run(tmp_path / "b", train=cut)
    losses = [[row["loss"] for row in history(run)] for run in (whole, other)]
    # Twelve steps carry fp32 rounding on.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert whole.state.step_sums.load_LE == other.state.step_sums.load_LE


def test_recomputing_activations_changes_nothing(tmp_path):
    kept = started_run(tmp_path / "a")
    recomputed = started_run(tmp_path / "b", train={"gradient_checkpointing": True})
    assert history(kept) == history(recomputed)
    assert kept.state.step_sums.load_LE == recomputed.state.step_sums.load_LE


def test_every_token_is_counted_by_every_router(tmp_path):
    run = started_run(tmp_path)
    history(run)
    tokens, experts_per_token = 12 * 2 * 2 * 32, 2
    trunk, ahead = [sum(load) for load in run.state.step_sums.load_LE]
    assert trunk == tokens * experts_per_token
    assert ahead == tokens * experts_per_token * 31 // 32  # a prediction module has no target for the last position


@pytest.mark.parametrize("poisoned", ["lm_head.weight", "model.layers.1.mlp.experts.down_proj"])
def test_a_loss_that_is_not_finite_stops_the_training_before_it_reaches_the_weights(tmp_path, poisoned):
    run = started_run(tmp_path)
    saved_at: list[int] = []
    before: dict[str, torch.Tensor] = {}

    def poison(run: Run) -> None:
        if run.state.step == 3:
            with torch.no_grad():
                dict(run.model.named_parameters())[poisoned].view(-1)[5] = math.nan
            before.update(weights(run))

    with pytest.raises(UserError, match=r"step 3: loss is nan.*sequences 12 to 15 of the run.*learning_rate"):
        train(run, [Hook(1, poison)], lambda run: saved_at.append(run.state.step))
    assert saved_at == [3]
    for name, weight in weights(run).items():
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num()), name


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_training_after_the_step_that_is_being_done(tmp_path, number, status):
    run = started_run(tmp_path)
    saved_at: list[int] = []

    def stop(run: Run) -> None:
        if run.state.step == 4:
            run.interruption.remember(number, None)

    with pytest.raises(Interrupted, match="stopped after step 5 of 12, saved") as stopped:
        train(run, [Hook(1, stop)], lambda run: saved_at.append(run.state.step))
    assert stopped.value.exit_status == status
    assert saved_at == [5]


def test_hooks_are_called_every_so_many_steps_and_after_the_last(tmp_path):
    called: list[int] = []
    train(started_run(tmp_path), [Hook(5, lambda run: called.append(run.state.step))], no_save)
    assert called == [5, 10, 12]


def test_the_bias_stands_still_when_gamma_is_frozen(tmp_path):
    run = started_run(tmp_path, train={"bias_freeze_ratio": 0.5, "warmup_ratio": 0.0})
    biases: list[torch.Tensor] = []
    train(run, [Hook(1, lambda run: biases.append(run.model.routers()[0][1].e_score_correction_bias.clone()))], no_save)
    moved = [not torch.equal(earlier, later) for earlier, later in pairwise(biases)]
    assert moved == [True] * 5 + [False] * 6


def favour_two_experts(run: Run) -> None:
    """Give all tokens a common direction and turn two experts' router rows towards it."""
    with torch.no_grad():
        run.model.model.embed_tokens.weight += 0.02
        router = run.model.routers()[0][1]
        router.weight.mul_(5).add_(torch.tensor([0.05, 0.05, -0.05, -0.05])[:, None])


@pytest.mark.parametrize(("rate", "is_balanced"), [(0.005, True), (0.0, False)])
def test_loss_free_balancing_is_what_brings_a_lopsided_router_to_balance(tmp_path, rate, is_balanced):
    run = started_run(
        tmp_path,
        train={"max_steps": 100, "bias_update_rate": rate, "bias_freeze_ratio": 0.0, "learning_rate": 1.0e-5}
        | {"sequence_loss_weight": 0.0},
        architecture={"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
    )
    favour_two_experts(run)
    loads: list[torch.Tensor] = []

    def remember(run: Run) -> None:
        loads.append(torch.tensor(run.state.step_sums.load_LE))
        run.state.step_sums.load_LE = []

    train(run, [Hook(1, remember)], no_save)
    assert max_vio(loads[0]).item() > 0.6
    # Loads of single batches of 128 tokens scatter; those of the last 20 steps together do not.
    assert (max_vio(sum(loads[-20:], torch.zeros_like(loads[0]))).item() < 0.1) == is_balanced


def test_documents_see_the_ones_before_them_unless_they_are_told_not_to(tmp_path):
    """The first loss of a batch of several documents is the mean of what each of them has alone."""
    runs = [
        started_run(
            tmp_path / str(sees),
            train={"cross_document_attention": sees},
            architecture={"initializer_range": 0.3},  # with small weights hardly anything depends on the context
        )
        for sees in (True, False)
    ]
    losses = []
    for run in runs:
        tokens = next(run.micro_batches())[:1, :-1]
        # The made-up text is one document: cut it at its most frequent letter.
        run.plan.meta["bos_token_id"] = end_of_text = int(tokens.mode().values)
        with torch.no_grad():
            out = run.model(input_ids=tokens, position_ids=run.position_ids(tokens), labels=tokens)
        losses.append(out.cross_entropy_loss.item())
    assert runs[0].position_ids(tokens) is None
    starts = sorted({0, *(tokens[0] == end_of_text).nonzero().flatten().tolist(), tokens.shape[1]})
    assert len(starts) > 3
    with torch.no_grad():
        documents = [(tokens[:, start:end], end) for start, end in pairwise(starts)]
        logits = torch.cat([runs[1].model(input_ids=document).logits for document, _ in documents], dim=1)
    alone = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).item()
    assert losses[1] == pytest.approx(alone, rel=1e-5)
    assert losses[0] != pytest.approx(alone, rel=1e-3)


def test_a_ramped_batch_takes_the_same_sequences_in_more_steps(tmp_path):
    ramp = {"batch_ramp_levels": 2, "batch_ramp_ratio": 0.5, "max_steps": -1, "num_train_epochs": 0.25}
    plain, ramped = (
        started_run(tmp_path / "a", train={**ramp, "batch_ramp_levels": 1}),
        started_run(tmp_path, train=ramp),
    )
    history(plain)
    history(ramped)
    assert ramped.plan.total_steps > plain.plan.total_steps
    assert ramped.plan.tokens_before(ramped.state.step) >= plain.plan.tokens_before(plain.state.step)
    counted = [sum(run.state.step_sums.load_LE[0]) for run in (plain, ramped)]
    assert counted == [2 * run.plan.tokens_before(run.state.step) for run in (plain, ramped)]

"""Balancing while a model learns, and its counts where a step is cut in every way at once.

As a module, this file is the program of one of two training processes: it writes the loads of every step.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from dsv3.evaluation.load_balance import max_vio
from dsv3.training.loop import Hook, Run, train
from tests.training_inputs import run_python, started_run

GAMMA = 0.01
"""Ten times the report's, so that 100 steps do what 1,000 would: the favoured start about 0.4 ahead in affinity."""

MAX_STEPS = 100
LAST = 40
"""Steps whose loads are added up: those of single batches of 128 tokens scatter, whatever the bias."""

WIDE = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
WORKERS = "import sys; from dsv3.training.launch import run_workers; run_workers(2, sys.argv[1], sys.argv[2:])"


def loads_of(run: Run) -> list[torch.Tensor]:
    """Train to the end; return the load of each step, layers by experts, added up over processes."""
    loads: list[torch.Tensor] = []

    def remember(run: Run) -> None:
        loads.append(torch.tensor(run.state.step_sums.load_LE))
        run.state.step_sums.load_LE = []

    train(run, [Hook(1, remember)], lambda run: None)
    return loads


@pytest.mark.parametrize("rate", [GAMMA, 0.0])
def test_routers_that_favour_two_experts_come_to_balance_by_gamma_alone_while_the_model_learns(tmp_path, rate):
    settings = {"max_steps": MAX_STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    settings |= {"bias_update_rate": rate, "bias_freeze_ratio": 0.0, "sequence_loss_weight": 0.0, "learning_rate": 3e-4}
    run = started_run(tmp_path, train=settings, architecture=WIDE)
    with torch.no_grad():
        run.model.model.embed_tokens.weight += 0.02  # a direction that all tokens share
        for _, router in run.model.routers():
            router.weight.mul_(5)
            router.weight[:2] += 0.05
            router.weight[2:] -= 0.05
    loads = loads_of(run)
    assert len(run.model.routers()) == 2  # the trunk's and the MTP module's
    assert max_vio(loads[0]).min() > 1
    at_last = max_vio(torch.stack(loads[-LAST:]).sum(dim=0))
    assert at_last.max() < 0.1 if rate else at_last.min() > 1


def test_two_processes_accumulating_and_recomputing_count_what_one_pass_counts_integer_for_integer(tmp_path):
    steps = {"max_steps": 3, "sequence_loss_weight": 0.0}
    whole = {**steps, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    expected = loads_of(started_run(tmp_path / "whole", train=whole, architecture=WIDE))
    cut = {**steps, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    name = "tests.dsv3.training.test_balancing_in_training"
    done = run_python(tmp_path, "-c", WORKERS, name, str(tmp_path), json.dumps(cut), timeout_s=300)
    assert done.returncode == 0, done.stderr
    seen = [json.loads((tmp_path / f"loads-{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0] == seen[1] == [load.tolist() for load in expected]
    # Two experts per token, eight sequences of 32; the MTP module has one position less.
    assert [load.sum(dim=1).tolist() for load in expected] == [[2 * 8 * 32, 2 * 8 * 31]] * 3


def work(folder: Path, settings: dict[str, object]) -> None:
    """Train as one of several processes; write the loads that this one knows of."""
    rank = os.environ["RANK"]
    run = started_run(folder / f"rank-{rank}", train=settings, architecture=WIDE)
    assert (run.layout.world_size, run.layout.accumulation(0)) == (2, 4)
    loads = [load.tolist() for load in loads_of(run)]
    (folder / f"loads-{rank}.json").write_text(json.dumps(loads))
    run.accelerator.wait_for_everyone()
    os._exit(0)  # Python's shutdown waits for gloo's threads, which do not always end once the other process has


if __name__ == "__main__":
    work(Path(sys.argv[1]), json.loads(sys.argv[2]))

"""Did anything change that should not have? Fifty steps of a micro training, against a committed curve.

`python -m tests.golden.test_loss_curve` writes the curve anew; say in the commit's message why it moved.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3.training.loop import Hook, Run, train
from tests.training_inputs import started_run

COMMITTED = Path(__file__).parent / "loss_curve.tsv"
NUM_STEPS = 50

RTOL = 1e-4
"""Another processor sums in another order: 1e-7 in a step, carried on by fifty of them. (Two experts' backends, which
differ in that order too, lie 1e-5 apart.)"""


def curve(folder: Path, experts: str = "cpu") -> np.ndarray:
    """Return (loss, multi-token prediction loss, gradient norm) of every step, both optimizers' parts at work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = started_run(
        folder,
        train={"max_steps": NUM_STEPS, "experts": experts, "optim": "muon", "learning_rate": 2.0e-3}
        | {"weight_decay": 0.1, "lr_scheduler_type": "deepseek_v3", "precision": "fp32"},
    )
    sums: list[list[float]] = []

    def remember(run: Run) -> None:
        sums.append([run.state.step_sums.sums[name] for name in ("loss", "mtp_loss", "grad_norm")])

    train(run, [Hook(1, remember)], lambda run: None)
    torch.set_num_threads(threads)
    return np.diff(np.array(sums), axis=0, prepend=0.0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return curve(tmp_path_factory.mktemp("golden"))


def test_the_loss_curve_is_the_committed_one(measured):
    np.testing.assert_allclose(measured, np.loadtxt(COMMITTED, skiprows=1), rtol=RTOL)


def test_the_curve_falls(measured):
    assert measured[-1, 0] < 0.7 * measured[0, 0]


def test_on_one_machine_the_curve_is_the_same_bit_for_bit(measured, tmp_path):
    assert np.array_equal(curve(tmp_path), measured)


def test_another_backend_of_the_experts_gives_the_same_curve(measured, tmp_path):
    np.testing.assert_allclose(curve(tmp_path, experts="reference"), measured, rtol=RTOL)


def write() -> None:
    """Write the committed curve."""
    with tempfile.TemporaryDirectory() as folder:
        rows = curve(Path(folder))
    np.savetxt(COMMITTED, rows, fmt="%.9g", delimiter="\t", header="loss\tmtp_loss\tgrad_norm", comments="")


if __name__ == "__main__":
    write()

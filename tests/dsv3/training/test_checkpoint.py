import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dsv3.errors import UserError
from dsv3.training import checkpoint
from dsv3.training.checkpoint import (
    checkpoints,
    delete,
    fingerprint,
    load_best,
    load_checkpoint,
    locked,
    prune,
    save_best,
    save_checkpoint,
)

LAYOUT = {"model.safetensors", "optimizer.pt", "scheduler.pt", "config.json", "trainer_state.json", "complete"}


def model_and_optimizer(seed: int = 0) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(directory: Path, step: int, seed: int = 0) -> None:
    save_checkpoint(directory, *model_and_optimizer(seed), {"hidden_size": 3}, {"step": step, "loss": 0.1})


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_checkpoint_holds_the_files_people_look_for_and_gives_everything_back(tmp_path):
    save(tmp_path, 7, seed=1)
    assert names(tmp_path / "step_7") == LAYOUT
    model, optimizer = model_and_optimizer(seed=2)
    assert load_checkpoint(tmp_path / "step_7", model, optimizer) == {"step": 7, "loss": 0.1}
    expected, expected_optimizer = model_and_optimizer(seed=1)
    assert torch.equal(model.weight, expected.weight)
    state, expected_state = optimizer.state[model.weight], expected_optimizer.state[expected.weight]
    assert torch.equal(state["exp_avg"], expected_state["exp_avg"])


def test_the_newest_complete_checkpoint_comes_last_and_a_half_written_one_not_at_all(tmp_path):
    for step in (9, 10, 2):
        save(tmp_path, step)
    (tmp_path / "step_11").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_2", "step_9", "step_10"]


def test_a_crash_while_writing_leaves_the_older_checkpoint_and_nothing_that_looks_complete(tmp_path, monkeypatch):
    save(tmp_path, 5)

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_model", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 6)
    assert names(tmp_path) == {"step_5"}


def test_pruning_keeps_the_newest_and_the_best_and_removes_what_was_left_half_written(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
        save_best(tmp_path, nn.Linear(1, 1), step)
    (tmp_path / ".step_4.123.tmp").mkdir()
    prune(tmp_path, save_total_limit=2, best_step=1)
    assert names(tmp_path) == {"step_2", "step_3", "best_1"}


def test_the_best_weights_come_back(tmp_path):
    best, model = nn.Linear(2, 2), nn.Linear(2, 2)
    save_best(tmp_path, best, 3)
    load_best(tmp_path, model, 3)
    assert torch.equal(model.weight, best.weight)


def test_deleting_leaves_the_lock_to_its_holder(tmp_path):
    with locked(tmp_path / "run"):
        save(tmp_path / "run", 1)
        delete(tmp_path / "run")
        assert names(tmp_path / "run") == {"lock"}
    assert not (tmp_path / "run").exists()


def test_a_second_writer_is_refused_in_one_line_that_names_the_first(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (tmp_path / "lock").write_text(f"{sleeper.pid} {socket.gethostname()}")
        with pytest.raises(UserError, match=f"process and host {sleeper.pid} "), locked(tmp_path):
            pass
        assert (tmp_path / "lock").is_file()
    finally:
        sleeper.communicate(b"\n")
    with locked(tmp_path):  # its holder is gone now
        assert (tmp_path / "lock").read_text() == f"{os.getpid()} {socket.gethostname()}"


def test_a_lock_left_by_a_process_that_had_our_number_is_taken_over(tmp_path):
    (tmp_path / "lock").write_text(f"{os.getpid()} {socket.gethostname()}")
    with locked(tmp_path):
        assert (tmp_path / "lock").is_file()


def test_nothing_is_known_of_a_holder_on_another_host(tmp_path):
    (tmp_path / "lock").write_text("1 elsewhere")
    with pytest.raises(UserError, match="delete this file only if it is gone"), locked(tmp_path):
        pass


def test_a_fingerprint_depends_on_every_fact_and_not_on_their_order():
    facts = {"seed": 1, "train": {"learning_rate": 0.1, "optim": "muon"}}
    same = {"train": {"optim": "muon", "learning_rate": 0.1}, "seed": 1}
    assert fingerprint(facts) == fingerprint(same)
    assert fingerprint(facts) != fingerprint({**facts, "seed": 2})

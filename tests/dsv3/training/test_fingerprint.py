import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dsv3.training.checkpoint import save_checkpoint
from dsv3.training.fingerprint import Fingerprint, other_checkpoints, write_facts
from tests.damage import pipe

FACTS = {
    "seed": 1,
    "train": {"learning_rate": 0.1, "optim": "muon"},
    "tokens": "0" * 64,
    "code": {"dsv3/training/loss.py": "a", "dsv3/training/loop.py": "b"},
}


def write_checkpoint(directory: Path, facts: dict, experiment: str = "nano", step: int = 7) -> None:
    write_facts(directory, Fingerprint(facts), experiment)
    model = nn.Linear(1, 1)
    save_checkpoint(directory, model, torch.optim.AdamW(model.parameters()), {}, {"step": step})


def test_a_fingerprint_depends_on_every_fact_and_not_on_their_order():
    same = {name: FACTS[name] for name in reversed(FACTS)} | {"train": {"optim": "muon", "learning_rate": 0.1}}
    assert Fingerprint(FACTS).digest == Fingerprint(same).digest
    assert Fingerprint(FACTS).digest != Fingerprint({**FACTS, "seed": 2}).digest


def test_differences_are_told_as_the_user_knows_them_code_last():
    other = {
        "train": {"learning_rate": 0.2},
        "tokens": "1" * 64,
        "code": {"dsv3/training/loss.py": "c", "dsv3/training/loop.py": "b", "dsv3/training/gone.py": "d"},
    }
    assert Fingerprint(FACTS).differences(other) == [
        "seed is null there and 1 here",
        "train.learning_rate is 0.2 there and 0.1 here",
        'train.optim is null there and "muon" here',
        "the token data is other data",
        "dsv3/training/gone.py is other code",
        "dsv3/training/loss.py is other code",
    ]


def test_only_other_checkpoints_of_the_experiment_are_named(tmp_path):
    root = tmp_path / ".checkpoints"
    own = Fingerprint(FACTS)
    write_checkpoint(root / own.digest, FACTS)
    write_checkpoint(root / "tiny", {**FACTS, "seed": 2}, experiment="tiny")
    write_facts(root / "unsaved", Fingerprint({**FACTS, "seed": 3}), "nano")
    (root / "older" / "step_5").mkdir(parents=True)  # of a version that kept no facts
    assert other_checkpoints(root / own.digest, own, "nano") == ""
    write_checkpoint(root / "seeded", {**FACTS, "seed": 4})
    write_checkpoint(root / "seeded", {**FACTS, "seed": 4}, step=9)
    assert other_checkpoints(root / own.digest, own, "nano") == (
        "not resumed, of another training: .checkpoints/seeded/step_9 (seed is 4 there and 1 here); "
        "train.resume_from_checkpoint would start from one"
    )


def test_many_others_and_many_differences_stay_one_line(tmp_path):
    root, own = tmp_path / ".checkpoints", Fingerprint(FACTS)
    for seed in range(2, 7):
        write_checkpoint(root / f"seed_{seed}", {"seed": seed})
    line = other_checkpoints(root / own.digest, own, "nano")
    assert "\n" not in line
    assert line.count("step_7") == 3
    assert line.count("seed is") == 3
    assert " and 3 more); " in line  # differences
    assert " and 2 more; train." in line  # checkpoints


NESTED = '{"a": ' * 900 + "1" + "}" * 900


@pytest.mark.parametrize(
    ("text", "is_named"),
    [
        *((text, False) for text in ("", "{}", "[]", "null", "3", "[" * 100_000, '{"experiment": 3, "facts": {}}')),
        ('{"experiment": "nano", "facts": []}', False),
        ('{"experiment": "nano", "facts": ' + NESTED + "}", None),
        ('{"experiment": "nano"}', True),
        ('{"experiment": "nano", "facts": {"code": "x", "tokens": {}, "teachers": 3}}', True),
    ],
    ids=lambda value: str(value)[:40],
)
def test_facts_of_another_form_stop_nobody(tmp_path, text, is_named):
    root, own = tmp_path / ".checkpoints", Fingerprint(FACTS)
    write_checkpoint(root / "other", {**FACTS, "seed": 2})
    assert other_checkpoints(root / own.digest, own, "nano") != ""
    (root / "other" / "facts.json").write_text(text)
    line = other_checkpoints(root / own.digest, own, "nano")
    assert "\n" not in line
    assert is_named is None or ("step_" in line) == is_named  # how deep Python reads is its own affair


def test_facts_that_another_training_removes_or_damages_stop_nobody(tmp_path):
    root, own = tmp_path / ".checkpoints", Fingerprint(FACTS)
    write_checkpoint(root / "cut", {**FACTS, "seed": 2})
    (root / "cut" / "facts.json").write_text(json.dumps({"experiment": "nano"})[:-4])
    (root / "gone").mkdir()
    (root / "gone" / "facts.json").symlink_to(root / "nowhere")
    write_checkpoint(root / "pipe", {**FACTS, "seed": 2})
    pipe(root / "pipe" / "facts.json")
    assert other_checkpoints(root / own.digest, own, "nano") == ""

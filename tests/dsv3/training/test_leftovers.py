import json
import os
import time
from pathlib import Path

import pytest

from dsv3.training.leftovers import DAY_S, remove_leftovers
from dsv3.training.lock import hold_lock

OWN, OTHER = "0" * 16, "1" * 16


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / OWN).mkdir()
    return tmp_path


def leave(root: Path, ended: str = "no", days: float = 0, name: str = OTHER) -> Path:
    """What a training leaves: a checkpoint, its facts, a temporary folder; `days` old."""
    folder = root / name
    for each in ("step_7", "damaged_step_5", ".step_8.host.1.tmp"):
        (folder / each).mkdir(parents=True)
        (folder / each / "complete").touch()
    (folder / "facts.json").write_text(json.dumps({"experiment": "nano", "ended": ended, "facts": {"seed": 1}}))
    then = time.time() - days * DAY_S
    for path in (*folder.iterdir(), folder):
        os.utime(path, (then, then))
    return folder


def removed(root: Path, named: Path | None = None) -> tuple[bool, list[str]]:
    lines: list[str] = []
    remove_leftovers(root / OWN, 30, named, lines.append)
    return not (root / OTHER).exists(), lines


def test_a_finished_trainings_checkpoint_goes_without_a_word(root):
    leave(root, "finished")
    assert removed(root) == (True, [])


def test_an_abandoned_one_goes_after_its_days_with_a_line(root):
    folder = leave(root, days=31)
    line = (
        f"removed {folder}: a training that stopped 31 days ago and never went on (runtime.keep_abandoned_days is 30)"
    )
    assert removed(root) == (True, [line])


@pytest.mark.parametrize(("ended", "days"), [("no", 29), ("kept", 400)])
def test_what_may_go_on_stays(root, ended, days):
    leave(root, ended, days)
    assert removed(root) == (False, [])


@pytest.mark.parametrize(("ended", "days"), [("no", 31), ("finished", 0)])
def test_nothing_is_removed_from_under_a_process_that_holds_it(root, ended, days):
    folder = leave(root, ended, days)
    with hold_lock(folder):
        assert removed(root) == (False, [])
    assert removed(root)[0]


@pytest.mark.parametrize("ended", ["finished", "no"])
def test_what_the_training_starts_from_stays(root, ended):
    folder = leave(root, ended, days=31)
    assert removed(root, folder / "step_7") == (False, [])


def test_its_own_folder_and_what_is_not_of_a_training_stay(root):
    leave(root, "finished", days=31, name="notes")
    for each in (root / OWN, root / "locks"):
        each.mkdir(exist_ok=True)
        os.utime(each, (0, 0))
    (root / OTHER).symlink_to(root / "notes")
    assert removed(root) == (False, [])
    assert {path.name for path in root.iterdir()} >= {OWN, OTHER, "notes", "locks"}
    assert (root / "notes" / "step_7").is_dir()


def test_a_file_of_the_users_in_the_folder_stays(root):
    folder = leave(root, "finished")
    (folder / "why.txt").write_text("mine")
    removed(root)
    assert [path.name for path in folder.iterdir()] == ["why.txt"]


def test_facts_that_cannot_be_read_are_those_of_a_training_that_has_not_ended(root):
    folder = leave(root, "finished")
    (folder / "facts.json").write_text("[")
    assert removed(root) == (False, [])

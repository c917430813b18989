import json
import shutil

import pytest
import torch

from dsv3.errors import UserError
from dsv3.training.checkpoint import (
    STEP_FILES,
    check_checkpoint,
    delete_checkpoints,
    load_best,
    load_checkpoint,
    prune,
    save_best,
    save_checkpoint,
    set_aside_damaged,
)
from tests.damage import DAMAGES, flip
from tests.dsv3.training.test_checkpoint import model_and_optimizer, names

FILES = sorted({*STEP_FILES, "complete"})


@pytest.fixture
def directory(tmp_path):
    folder = tmp_path / "f1"
    folder.mkdir()
    for step in (5, 10):
        model, optimizer = model_and_optimizer(seed=step)
        save_checkpoint(folder, model, optimizer, {"hidden_size": 3}, {"step": step, "best_step": 4})
    save_best(folder, model, 4)
    return folder


def found(directory, with_best=False):
    lines: list[str] = []
    folder = set_aside_damaged(directory, with_best, lines.append)
    return (folder.name if folder else None), lines


def test_whole_checkpoints_are_taken_without_a_word(directory):
    assert found(directory, with_best=True) == ("step_10", [])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_from_any_damage_to_the_newest_the_older_one_is_taken_and_a_line_says_why(directory, file, damage):
    DAMAGES[damage](directory / "step_10" / file)
    folder, (line,) = found(directory)
    assert folder == "step_5"
    assert line.startswith(f"{directory / 'step_10'}: not resumed, damaged: ")
    assert line.endswith("set aside as damaged_step_10")
    assert "\n" not in line
    assert names(directory) == {"step_5", "damaged_step_10", "best_4"}
    model, optimizer = model_and_optimizer(seed=1)
    load_checkpoint(directory / "step_5", model, optimizer)
    assert torch.equal(model.weight, model_and_optimizer(seed=5)[0].weight)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_a_named_checkpoint_is_told_in_one_line(directory, file, damage):
    DAMAGES[damage](directory / "step_10" / file)
    with pytest.raises(UserError, match=r"train.resume_from_checkpoint is .*(damaged|no complete checkpoint)") as told:
        check_checkpoint(directory / "step_10", {"hidden_size": 3}, 20)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("file", ["model.safetensors", "complete"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_best_weights_are_not_exported_and_not_resumed_to(directory, file, damage):
    DAMAGES[damage](directory / "best_4" / file)
    with pytest.raises(UserError, match="best_4: damaged"):
        load_best(directory, model_and_optimizer()[0], 4)
    assert found(directory, with_best=False) == ("step_10", [])
    folder, lines = found(directory, with_best=True)
    assert (folder, len(lines)) == (None, 2)
    assert all("its best weights, best_4: " in line for line in lines)


def test_where_all_are_damaged_each_has_its_line(directory):
    for step in (5, 10):
        flip(directory / f"step_{step}" / "optimizer.pt")
    folder, lines = found(directory)
    assert folder is None
    assert [line.partition(": ")[0] for line in lines] == [str(directory / "step_10"), str(directory / "step_5")]


def test_foreign_folders_are_neither_read_nor_removed(directory):
    for name in ("step_abc", "step_8 (copy)", "step_", "best_x", "notes"):
        (directory / name).mkdir()
    (directory / "step_77").write_text("a file")
    foreign = {"step_abc", "step_8 (copy)", "step_", "best_x", "notes"}
    assert found(directory) == ("step_10", [])
    prune(directory, 1, 4)
    assert names(directory) >= {*foreign, "step_10", "best_4"}
    delete_checkpoints(directory)
    assert names(directory) == foreign


def test_a_checkpoint_of_another_step_or_training_under_this_ones_name_is_set_aside(directory, tmp_path):
    shutil.copytree(directory / "step_5", directory / "step_999")
    shutil.copytree(directory / "step_5", tmp_path / "other" / "step_5")
    folder, (line,) = found(directory)
    assert (folder, "it is step 5 of the training f1" in line) == ("step_10", True)
    folder, (line,) = found(tmp_path / "other")
    assert (folder, "of the training f1" in line) == (None, True)


def test_complete_holds_digest_and_size_of_every_file_and_the_fingerprint(directory):
    content = json.loads((directory / "step_10" / "complete").read_text())
    assert (content["fingerprint"], content["step"], set(content["files"])) == ("f1", 10, STEP_FILES)
    for name, file in content["files"].items():
        assert file["size"] == (directory / "step_10" / name).stat().st_size

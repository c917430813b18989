import json
import random
import shutil

import pytest

from tests.stress import trainings
from tests.stress.processes import Failure
from tests.stress.soak import Tally
from tests.stress.trials import Outcome


class Nothing:
    def clear(self):
        pass


def test_the_table_says_what_was_done_and_how_it_ended():
    def fails(*_):
        raise Failure("a hang")

    tally, draw = Tally(), random.Random(0)
    tally.attempt("kill", lambda *_: Outcome(3, ["fell back"]), Nothing(), draw)
    tally.attempt("kill", fails, Nothing(), draw)
    assert tally.failed == 1
    assert tally.table().splitlines()[2:] == ["| kill | 2 | 3 | 1 | 1 | 1 |", "| **all** | 2 | 3 | 1 | 1 | 1 |"]


@pytest.fixture
def trained(tmp_path):
    folder = tmp_path / "training"
    (folder / ".checkpoints" / "f" / "step_4").mkdir(parents=True)
    (folder / "final_model").mkdir()
    (folder / "results").mkdir()
    for path in ("final_model", ".checkpoints/f/step_4"):
        (folder / path / "model.safetensors").write_bytes(b"weights")
    for table in ("history", "validation", "router"):
        (folder / "results" / f"{table}.tsv").write_text("step\tloss\tstep_s\n4\t1.5\t0.1\n")
    return folder


@pytest.mark.parametrize(
    ("file", "content", "is_told"),
    [
        ("final_model/model.safetensors", "weightt", True),
        (".checkpoints/f/step_4/model.safetensors", "weightt", True),
        ("results/history.tsv", "step\tloss\tstep_s\n4\t1.6\t0.1\n", True),
        ("results/history.tsv", "step\tloss\tstep_s\n4\t1.5\t0.2\n", False),
    ],
)
def test_a_difference_in_weights_or_tables_is_a_failure_and_one_in_times_is_none(
    trained, tmp_path, monkeypatch, file, content, is_told
):
    other = shutil.copytree(trained, tmp_path / "other")
    (other / file).write_text(content)
    expected = trainings.result(trained)
    several = trainings.Trainings(tmp_path / "several", json)
    monkeypatch.setattr(several, "undisturbed", lambda *_: expected)
    if is_told:
        with pytest.raises(Failure, match="differs from an undisturbed training's"):
            several.check("form", other)
    else:
        several.check("form", other)

"""Writing beside the steps that follow; tests/dsv3/training/test_sharding.py does it with several processes."""

import threading

import pytest
import torch

from dsv3.training import background
from dsv3.training.background import Background, background_writing
from dsv3.training.checkpoint import copied
from tests.committed import DEFAULTS

WAIT_S = 30


@pytest.fixture
def writing(monkeypatch) -> Background:
    monkeypatch.setattr(background.dist, "new_group", lambda **_: None)
    return Background(WAIT_S)


def test_the_caller_goes_on_while_it_is_written(writing):
    goes_on, seen = threading.Event(), []
    writing.start(lambda: seen.append(goes_on.wait(WAIT_S)))
    assert seen == []
    goes_on.set()
    writing.wait()
    assert seen == [True]


def test_the_next_is_begun_when_the_last_is_done_and_finished(writing):
    seen = []
    writing.start(lambda: seen.append("first written"))
    writing.afterwards(lambda: seen.append(f"first finished by {threading.current_thread().name}"))
    writing.start(lambda: seen.append("second written"))
    writing.wait()
    writing.wait()
    assert seen == ["first written", f"first finished by {threading.current_thread().name}", "second written"]


def test_what_is_raised_there_is_raised_to_who_waits_once_and_nothing_is_finished(writing):
    def fail() -> None:
        raise OSError("no room")

    writing.start(fail)
    writing.afterwards(lambda: pytest.fail("finished"))
    with pytest.raises(OSError, match="no room"):
        writing.wait()
    writing.wait()


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_begun_is_done_when_the_block_ends_however_it_does(monkeypatch, fails):
    monkeypatch.setattr(background.dist, "new_group", lambda **_: None)
    seen, left = [], threading.Event()
    try:
        with background_writing(DEFAULTS.runtime.model_copy(update={"async_save": True})) as writing:
            assert writing is not None
            writing.start(lambda: seen.append(left.wait(0.2)))
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert seen == [False]


def test_nothing_is_made_where_it_is_not_wanted():
    with background_writing(DEFAULTS.runtime) as writing:
        assert writing is None


def test_what_is_saved_is_a_copy():
    weights = {"model": {"weight": torch.ones(3)}, "optimizer": {"state": {"weight": {"step": torch.tensor(1.0)}}}}
    saved = copied(weights)
    weights["model"]["weight"].zero_()
    weights["optimizer"]["state"]["weight"]["step"].zero_()
    assert saved["model"]["weight"].tolist() == [1, 1, 1]
    assert saved["optimizer"]["state"]["weight"]["step"] == 1

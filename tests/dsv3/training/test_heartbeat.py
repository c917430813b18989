"""When a process takes another for lost; what then happens to a training: tests/stages/test_train_sharded.py."""

import os
import subprocess
import sys
import threading

import pytest

from dsv3.errors import LOST_PROCESS_STATUS
from dsv3.training.heartbeat import SILENT_ROUNDS, Heartbeat, beat, key


class Store(dict):
    """A store that answers at once."""

    set = dict.__setitem__

    def multi_get(self, keys):
        return [self[key] for key in keys]


@pytest.fixture
def store():
    return Store({key(rank): "0" for rank in range(3)})


def rounds(number, beating, watching):
    """Let `number` rounds pass, in which some processes tell their beat; return what `watching` takes for lost."""
    for _ in range(number):
        for heartbeat in beating:
            heartbeat.exchange_beats()
        lost = watching.lost_processes()
    return lost


def test_processes_that_beat_are_never_lost(store):
    beating = [Heartbeat(store, rank, 3) for rank in range(3)]
    assert rounds(100, beating, beating[1]) == []


def test_a_process_that_no_longer_beats_is_lost_after_some_rounds(store):
    first, second, third = (Heartbeat(store, rank, 3) for rank in range(3))
    rounds(7, [third, second, first], first)
    assert rounds(SILENT_ROUNDS - 1, [second, first], first) == []
    assert rounds(1, [second, first], first) == [2]


def test_a_process_that_beats_again_in_time_is_kept(store):
    first, second = (Heartbeat(store, rank, 2) for rank in range(2))
    for _ in range(10):
        assert rounds(SILENT_ROUNDS - 1, [first], first) == []
        assert rounds(1, [second, first], first) == []


def test_where_the_store_no_longer_answers_all_others_are_lost(store):
    first, *others = (Heartbeat(store, rank, 3) for rank in range(3))
    rounds(3, [*others, first], first)
    assert rounds(SILENT_ROUNDS, others, first) == [1, 2]  # its own exchange waits for ever


def test_a_store_that_is_gone_ends_the_exchange_and_raises_nothing(monkeypatch, store):
    def gone(*_: object) -> None:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr("dsv3.training.heartbeat.ROUND_S", 0.0)
    store.set = gone
    beat(Heartbeat(store, 0, 3), threading.Event())


def test_a_process_whose_errors_nobody_reads_ends_too():
    reading, writing = os.pipe()
    os.close(reading)
    code = "from dsv3.training.heartbeat import end_process; end_process([1])"
    assert subprocess.run([sys.executable, "-c", code], stderr=writing, check=False).returncode == LOST_PROCESS_STATUS
    os.close(writing)

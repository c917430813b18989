import os
import signal

import pytest

from dsv3.training.interruption import caught_signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_remembered_instead_of_obeyed(number, status):
    with caught_signals() as interruption:
        os.kill(os.getpid(), number)
        assert interruption.signal_number == number
        assert interruption.exit_status == status


def test_the_first_of_two_signals_counts():
    with caught_signals() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert interruption.signal_number == signal.SIGTERM


def test_afterwards_signals_do_what_they_did_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), caught_signals():
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

import os
import signal
import subprocess
import sys
import time

import pytest

from dsv3.errors import STOP_SIGNALS
from dsv3.training.interruption import REPEAT_S, catching_signals

STATUS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]

HANGING = """
import ctypes, threading
from dsv3.training.interruption import catching_signals
with catching_signals():
    print("ready", flush=True)
    {hang}
"""
HANGS = {
    "in a lock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "in a collective": "while True: ctypes.CDLL(None).pause()",
}


@pytest.mark.parametrize(("number", "status"), STATUS)
def test_a_signal_is_remembered_instead_of_obeyed(number, status):
    """Raised in the thread that runs the handlers: one sent to the process may reach another thread, and be late."""
    with catching_signals() as interruption:
        signal.raise_signal(number)
        assert interruption.signal_number == number
        assert interruption.exit_status == status


def test_the_first_of_two_signals_counts_and_a_launchers_repetition_does_not_end_the_process():
    with catching_signals() as interruption:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
    assert interruption.signal_number == signal.SIGTERM


def test_under_nohup_the_terminals_end_is_not_heard_and_other_signals_are():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catching_signals() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert interruption.signal_number == 0
            signal.raise_signal(signal.SIGTERM)
            assert interruption.signal_number == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_afterwards_signals_do_what_they_did_before():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(RuntimeError), catching_signals():
        raise RuntimeError
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_forked_process_that_lives_on_does_not_keep_the_block_from_ending():
    """It has the pipe open, as a data worker has."""
    with catching_signals():
        child = os.fork()
        if not child:
            time.sleep(20)
            os._exit(0)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
@pytest.mark.parametrize(("number", "status"), STATUS)
def test_a_second_signal_ends_a_process_that_hangs(hang, number, status):
    command = [sys.executable, "-c", HANGING.format(hang=hang)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        time.sleep(REPEAT_S + 0.2)
        assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert errors == f"stopped at once by a second signal ({number.name})\n"


def test_a_second_signal_ends_a_process_whose_errors_nobody_reads():
    command = [sys.executable, "-c", HANGING.format(hang=HANGS["in a lock"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        time.sleep(REPEAT_S + 0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143

"""Signals that ask a training to stop: SIGINT (Ctrl-C), SIGTERM, and SIGHUP (the terminal is gone).

The first one is remembered, not obeyed, so that the step is finished and saved. A second one ends the process at once,
without saving: whoever sends it sees a training that does not stop, because a step, a data worker or a tracker hangs.

A Python handler runs only when the main thread comes back from what it is doing, which a hanging collective never does.
So the decision is made in a thread of its own: the interpreter's C handler writes each signal's number to a pipe
(`signal.set_wakeup_fd`) whatever the main thread does, and the thread reads it there.

One request may arrive twice: a terminal sends Ctrl-C to the launcher and to its workers, and the launcher passes it on.
So signals within `REPEAT_S` of the first count as the same request. Under `nohup`, which has SIGHUP ignored, it stays
so: the training outlives its terminal.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from dsv3.errors import STOP_SIGNALS

END = 0
"""No signal's number. That the pipe is closed would not do: a forked process may hold it open."""
REPEAT_S = 1.0
"""Time after the first signal in which others count as its repetition."""


class Interruption:
    """Which signal, if any, has asked this process to stop."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._first_at = 0.0

    @property
    def exit_status(self) -> int:
        """Return what a shell reports for a process that the signal ended."""
        return 128 + self.signal_number

    def remember(self, signal_number: int, _frame: FrameType | None = None) -> None:
        """Keep the first signal's number; the handler that lets the step go on."""
        self.signal_number = self.signal_number or signal_number

    def watch(self, pipe: int) -> None:
        """Read signal numbers from `pipe` until one is END; end the process at the second request."""
        while END not in (numbers := os.read(pipe, 64)):
            for number in numbers:
                if number in STOP_SIGNALS and self._is_second():
                    line = f"stopped at once by a second signal ({signal.Signals(number).name})\n"
                    with suppress(OSError):  # nobody reads it any more
                        os.write(sys.stderr.fileno(), line.encode())
                    os._exit(128 + number)

    def _is_second(self) -> bool:
        """Return whether a signal that has just arrived repeats a request made `REPEAT_S` ago or earlier."""
        now = time.monotonic()
        self._first_at = self._first_at or now
        return now - self._first_at >= REPEAT_S


@contextmanager
def catching_signals() -> Iterator[Interruption]:
    """Yield the record of signals that arrive within the block; restore the handlers after it. Main thread only."""
    interruption = Interruption()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=interruption.watch, args=(reading,), name="signals", daemon=True)
    watcher.start()
    wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    heard = [number for number in STOP_SIGNALS if not (is_nohup and number == signal.SIGHUP)]
    before = {number: signal.signal(number, interruption.remember) for number in heard}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        os.write(writing, bytes([END]))
        watcher.join()
        os.close(writing)
        os.close(reading)

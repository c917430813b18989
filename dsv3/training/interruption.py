"""Ctrl-C and SIGTERM during a training: remembered, not obeyed at once, so that the step is finished and saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Which signal, if any, has asked this process to stop. Signals may come twice: from a terminal and a launcher."""

    def __init__(self) -> None:
        self.signal_number = 0

    @property
    def exit_status(self) -> int:
        """Return what a shell reports for a process that the signal ended."""
        return 128 + self.signal_number

    def remember(self, signal_number: int, _frame: FrameType | None) -> None:
        """Keep the first signal's number."""
        self.signal_number = self.signal_number or signal_number


@contextmanager
def caught_signals() -> Iterator[Interruption]:
    """Yield the record of signals that arrive within the block; restore the handlers after it."""
    interruption = Interruption()
    before = {number: signal.signal(number, interruption.remember) for number in SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

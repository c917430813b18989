"""Whether the other processes of a training still live: each says so every few seconds, from a thread of its own.

A process that is stopped, or that a cut network has taken away, leaves the others waiting in a collective. A bound on
that wait (`runtime.ddp_timeout`) must be long, for it also ends the wait for a process that is at work: the main one
writes a checkpoint or the exported model, each compiles the model before its first step. A beat needs neither the main
thread nor the network of the collectives: it goes to the store at which the processes have met. Writing, compiling and
reading leave Python's lock to it. So a process that is at work is never silent, and the bound on silence is short.

Rounds are counted, not seconds: a machine that sleeps, or a whole training that is stopped and goes on (Ctrl-Z, fg),
makes none meanwhile.
"""

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from dsv3.errors import LOST_PROCESS_STATUS

ROUND_S = 3.0
"""Between two beats."""
SILENT_ROUNDS = 5
"""After which a process counts as lost. A launcher (torch's agent) then waits 30 s for it: within 60 s all is over."""


class Heartbeat:
    """The beats of all processes, in a store that they share."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self._own_key, self._number = store, key(rank), 0
        self._others = [other for other in range(world_size) if other != rank]
        self._beats: dict[int, bytes] = {}
        self._heard: dict[int, bytes] = {}
        self._silent_rounds = dict.fromkeys(self._others, 0)

    def exchange_beats(self) -> None:
        """Write the own beat and read the others'; waits for a first beat, and where the store does not answer."""
        self._number += 1
        self._store.set(self._own_key, str(self._number))
        beats = self._store.multi_get([key(other) for other in self._others])
        self._beats = dict(zip(self._others, beats, strict=True))

    def lost_processes(self) -> list[int]:
        """Return the processes that have been silent for too long; called once a round."""
        beats = self._beats
        for rank in self._others:
            is_silent = beats.get(rank) == self._heard.get(rank)
            self._silent_rounds[rank] = self._silent_rounds[rank] + 1 if is_silent else 0
        self._heard = beats
        return [rank for rank, rounds in self._silent_rounds.items() if rounds >= SILENT_ROUNDS]


def beat(heartbeat: Heartbeat, stopped: threading.Event) -> None:
    """Exchange beats every round; end where the store is gone, so that no beat is heard any more."""
    with suppress(RuntimeError):  # torch's, for a lost connection
        while not stopped.wait(ROUND_S):
            heartbeat.exchange_beats()


def watch(heartbeat: Heartbeat, stopped: threading.Event) -> None:
    """End this process when others are silent."""
    while not stopped.wait(ROUND_S):
        if lost := heartbeat.lost_processes():
            end_process(lost)


def key(rank: int) -> str:
    """Return the store's key of a process's beat."""
    return f"dsv3/beat/{rank}"


def end_process(lost: Sequence[int]) -> None:
    """End this process, whose main thread waits for the `lost` ones, at once and with a line."""
    numbers = ", ".join(map(str, lost))
    line = (
        f"no sign of life from process {numbers} of this training for {ROUND_S * SILENT_ROUNDS:.0f} s (stopped, or the "
        "network is cut), so this one ends; dvc repro goes on from the last checkpoint\n"
    )
    with suppress(OSError):  # nobody reads it any more
        os.write(sys.stderr.fileno(), line.encode())
    os._exit(LOST_PROCESS_STATUS)


@contextmanager
def watching_processes() -> Iterator[None]:
    """Watch the other processes within the block, where there are any.

    They have just met, in their process group, and leave the block together.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    # A connection of its own: the main thread may wait on the other one.
    shared: Any = dist.distributed_c10d._get_default_store()
    heartbeat, stopped = Heartbeat(shared.clone(), dist.get_rank(), dist.get_world_size()), threading.Event()
    for work in (beat, watch):
        threading.Thread(target=work, args=(heartbeat, stopped), name=work.__name__, daemon=True).start()
    try:
        yield
    finally:
        stopped.set()

"""Writing beside the steps that follow, for the checkpoints of a sharded training (`runtime.async_save`).

Of a checkpoint only the copy of what is saved has to be made between two steps: each process copies its shards into the
CPU's memory. A thread then does the rest as it is done without this (`dsv3.training.checkpoint`): it writes the copy,
and the main process's hashes all files, marks the folder complete and renames it. Threads of the processes meet in a
process group of their own, for collectives of two threads would mix in one; it is gloo's, which needs no GPU.

torch's own `async_save` ends with the tensors in their files, and would leave hashes and names to the training's
thread; so what runs beside it here is the whole save. What we give up: memory for the copies, and a checkpoint's time:
a training that is killed while one is written goes on from the one before.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dsv3.params.runtime import RuntimeParams


class Background:
    """A thread that writes one thing at a time, in each of the processes."""

    def __init__(self, timeout_s: int) -> None:
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        """Of these threads; made by all processes together."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        self._written: Future[None] | None = None
        self._finish: Callable[[], object] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begin to `write`, after what was begun before is done."""
        self.wait()
        self._written = self._thread.submit(write)

    def afterwards(self, finish: Callable[[], object]) -> None:
        """Have `finish` called in the thread that waits, when what was begun is done."""
        self._finish = finish

    def wait(self) -> None:
        """Wait for what was begun, if anything; raise what was raised there."""
        written, finish, self._written, self._finish = self._written, self._finish, None, None
        if written is not None:
            written.result()
        if finish is not None:
            finish()

    def close(self) -> None:
        """Wait for the thread's end, whatever its outcome."""
        self._thread.shutdown()


@contextmanager
def background_writing(runtime: RuntimeParams) -> Iterator[Background | None]:
    """Yield what writes beside the block, done at its end; None where it is not wanted. All processes call this."""
    if not runtime.async_save:
        yield None
        return
    background = Background(runtime.ddp_timeout)
    try:
        yield background
        background.wait()
    finally:
        background.close()

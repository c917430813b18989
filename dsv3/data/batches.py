"""Batches as a pure function of (seed, step): nothing to save, nothing to restore.

Every sequence of a training has a number n. The token stream is cut into blocks; one epoch visits each block once, in
an order drawn for that epoch, so n says which epoch (n // blocks per epoch) and which block. Where the borders of the
blocks lie is drawn for each epoch too (a phase), so the same words are seen in other surroundings each time. The stream
is read as a circle: the block that crosses the end goes on at the beginning, where the end-of-text token stands anyway;
thus every epoch has the same number of blocks, whatever its phase.

Because of this, resuming needs only the step, and the number of processes does not change which sequences a step sees.
The alternative, a shuffling iterator, has a state that must be saved with each checkpoint and depends on the number of
processes and workers. It costs two things: up to block_size - 1 tokens per epoch (others each time) fall between the
last block and the first, and the order of an epoch takes 8 bytes of memory per block.

The order comes from the raw bit stream of PCG64, which NumPy promises never to change (it does not promise that for
`Generator.permutation`).

Letters: B sequences, S positions.
"""

import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from dsv3.data.shards import TokenStream
from dsv3.errors import STOP_SIGNALS, UserError


@dataclass(frozen=True)
class Batches:
    """The training sequences of a run, addressed by number."""

    stream: TokenStream
    block_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.stream) <= self.block_size:
            raise UserError(
                f"train.block_size is {self.block_size}; must be < {len(self.stream)}, "
                f"the tokens of the split in {self.stream.paths[0].parent}"
            )

    @cached_property
    def num_blocks_per_epoch(self) -> int:
        """Number of sequences in one pass over the tokens."""
        return len(self.stream) // self.block_size

    def sequences(self, first: int, count: int) -> torch.Tensor:
        """Return sequences number `first` to `first + count - 1` of the run as int64, (count, block_size + 1).

        The token after a block is the target of the block's last one.
        """
        tokens_BS = np.empty((count, self.block_size + 1), np.int64)
        for row, number in enumerate(range(first, first + count)):
            epoch, position = divmod(number, self.num_blocks_per_epoch)
            order, phase = _epoch_order(self.seed, epoch, self.num_blocks_per_epoch, len(self.stream))
            start = (phase + int(order[position]) * self.block_size) % len(self.stream)
            tokens_BS[row] = self._circular(start, self.block_size + 1)
        return torch.from_numpy(tokens_BS)

    def _circular(self, start: int, length: int) -> npt.NDArray[np.unsignedinteger]:
        """Return `length` tokens from `start`; after the last token of the stream comes its first."""
        head = self.stream[start : start + length]
        return head if len(head) == length else np.concatenate([head, self.stream[: length - len(head)]])


@lru_cache(maxsize=2)  # a batch may span two epochs
def _epoch_order(seed: int, epoch: int, num_blocks: int, num_tokens: int) -> tuple[npt.NDArray[np.int64], int]:
    """Return the order in which an epoch visits its blocks, and the token at which its first block starts."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    phase = int(bits.random_raw()) % num_tokens
    return np.argsort(bits.random_raw(num_blocks), kind="stable"), phase


@dataclass(frozen=True)
class StepLayout:
    """How the sequences of a run are distributed over optimizer steps, processes and forward passes.

    Step n has the micro-batches number `starts[n]` to `starts[n + 1] - 1` of the run, of `micro_batch_size` sequences
    each; process `rank` of `world_size` takes every world_size-th of them. `world_size` must divide their number.
    """

    micro_batch_size: int
    starts: Sequence[int]
    rank: int = 0
    world_size: int = 1

    def accumulation(self, step: int) -> int:
        """Return the number of forward passes of `step`, over all processes."""
        return self.starts[step + 1] - self.starts[step]

    def sequences_before(self, step: int) -> int:
        """Return the number of the first sequence of `step`."""
        return self.starts[step] * self.micro_batch_size

    def micro_batches(self, steps: range) -> Iterator[int]:
        """Yield the numbers, counted over the run, of this process's micro-batches of the given steps."""
        for step in steps:
            yield from range(self.starts[step] + self.rank, self.starts[step + 1], self.world_size)


@dataclass(frozen=True)
class _MicroBatches(Dataset[torch.Tensor]):
    """The micro-batches of a run by number."""

    batches: Batches
    micro_batch_size: int

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.batches.sequences(number * self.micro_batch_size, self.micro_batch_size)


def micro_batches(
    batches: Batches, layout: StepLayout, steps: range, num_workers: int = 0, pin_memory: bool = False
) -> Generator[torch.Tensor]:
    """Yield this process's micro-batches of the given steps in order, each int64 (micro_batch_size, block_size + 1).

    Step `steps.start` of the training is the first. The tensors do not depend on `num_workers` (processes that prepare
    them) or `pin_memory` (page-locked memory, for CUDA only). The workers end when the iterator is closed.
    """
    loader = DataLoader(
        _MicroBatches(batches, layout.micro_batch_size),
        batch_size=None,
        sampler=layout.micro_batches(steps),
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader would draw from, and so alter, the global random state
    )
    with signals_held_back():
        tensors = iter(loader)
    yield from tensors


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Block the signals that ask a training to stop; a process that is forked in this block never gets them.

    A terminal, and what kills a process group, sends them to the data workers too. Only the process that trains may
    answer them: it takes its workers' end for a failure, and needs them until its step is done.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def document_positions(tokens_BS: torch.Tensor, bos_token_id: int) -> torch.Tensor:
    """Return each token's place in its document, counted from 0, (B, S).

    A document begins with bos, which precedes every one in the shards and each prompt, and at the sequence's start.
    """
    place_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
    begins_BS = (tokens_BS == bos_token_id) | (place_S == 0)
    return place_S - torch.where(begins_BS, place_S, 0).cummax(dim=1).values

"""What the soak samples, completely: `python -m tests.stress.proof NAME`, with a table as the soak's at the end.

Each takes minutes to an hour. The log (docs/log.md) has what they gave.
"""

import argparse
import itertools
import random
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

from tests.damage import DAMAGES
from tests.stress import disks, experiments, trials
from tests.stress.processes import Failure, Zygote
from tests.stress.soak import Tally
from tests.stress.trainings import FORMS, SHARDED_FORMS, Trainings
from tests.stress.trials import Outcome

SHORTEST = "muon, four steps"
Named = Iterator[tuple[str, trials.Trial]]


def kills(tally: Tally, number: int) -> Named:
    """So many kills at random moments, over all forms; every fifth training with two processes."""
    count = 0
    while sum(counts["disturbances"] for counts in tally.counts.values()) < number:
        form = list(FORMS)[count % len(FORMS)]
        count += 1
        if count % 5:
            yield form, partial(trials.killed, form=form)
        else:
            yield f"{form}, two processes", partial(trials.killed_two, form=form)


def lost(tally: Tally, number: int, how: signal.Signals) -> Named:
    """So many kills or stops of one of two processes that share a training, in each way of sharing."""
    for form in itertools.cycle(SHARDED_FORMS):
        if sum(counts["disturbances"] for counts in tally.counts.values()) >= number:
            return
        yield f"{how.name}, {form}", partial(trials.lost_one, form=form, number=how)


def crashes(tally: Tally, number: int) -> Named:
    """A kill before each event of a short training that changes its files; then before each of its resumption."""
    del number
    for event in range(1, 10_000):
        yield "kill -9 before a change of the file system", partial(crashed, event=event)
        if tally.reached("kill -9 before a change of the file system") < event:
            return


def crashed(trainings: Trainings, draw: random.Random, event: int) -> Outcome:
    """Kill a training before that event; it goes on."""
    del draw
    folder = trainings.fresh(SHORTEST)
    status = trainings.start(folder, crash_at=event).status(60.0)
    if status not in (0, -signal.SIGKILL):
        raise Failure(f"status {status}")
    trainings.finish(folder)
    trainings.check(SHORTEST, folder)
    return Outcome(int(status != 0))


def damages(tally: Tally, number: int) -> Named:
    """So many of the damages to a file of a stopped training's checkpoints: each kind to each file in each form."""
    every = list(product(FORMS, DAMAGES, range(14)))  # more than there are files
    random.Random(number).shuffle(every)
    every.sort(key=lambda one: one[0] != SHORTEST)  # all of these
    for form, damage, index in every:
        if sum(counts["disturbances"] for counts in tally.counts.values()) >= number:
            return
        yield damage, partial(damaged_one, form=form, damage=damage, index=index)


def damaged_one(trainings: Trainings, draw: random.Random, form: str, damage: str, index: int) -> Outcome:
    """Damage the file of that number, where there are so many."""
    del draw
    base = trainings.remembered(f"stopped {form}", lambda: trials.stopped(trainings, form))
    if index >= len(trials.saved_files(base)):
        return Outcome()
    folder = trainings.copied(base)
    return trials.damaged(trainings, form, folder, trials.saved_files(folder)[index], damage)


def full_disks(tally: Tally, number: int) -> Named:
    """All stages, with and without Aim, with `number` amounts of free space from none to enough."""
    del tally
    for with_aim, stage, part in product([False, True] if disks.HAS_AIM else [False], disks.STAGES, range(number)):
        name = f"{stage}, with Aim" if with_aim else stage
        yield name, partial(filled, with_aim=with_aim, stage=stage, share=part / number)


def filled(trainings: Trainings, draw: random.Random, with_aim: bool, stage: str, share: float) -> Outcome:
    """Run the stage with that share of the space that it takes."""
    del draw
    pipeline = disks.undisturbed(trainings, with_aim)
    pages = int(share * pipeline.written[stage] / disks.PAGE_BYTES)
    lines = pipeline.attempt(stage, pages * disks.PAGE_BYTES) or []
    return Outcome(len(lines), lines)


def full_at_each_write(tally: Tally, number: int) -> Named:
    """All stages, with and without Aim: the disk is full from each of a stage's changes of its files on."""
    del number
    for with_aim, stage in product([False, True] if disks.HAS_AIM else [False], disks.STAGES):
        name = f"{stage}, with Aim" if with_aim else stage
        for change in range(1, 10_000):
            yield name, partial(filled_at, with_aim=with_aim, stage=stage, change=change)
            if tally.reached(name) < change:
                break


def filled_at(trainings: Trainings, draw: random.Random, with_aim: bool, stage: str, change: int) -> Outcome:
    """Run the stage on a disk that is filled before that change; 0 disturbances where it makes fewer."""
    del draw
    lines = disks.undisturbed(trainings, with_aim).attempt(stage, full_at=change)
    return Outcome() if lines is None else Outcome(1, lines)


def races(tally: Tally, number: int) -> Named:
    """So many races for a lock that a killed process has left."""
    del tally
    for _ in range(number):
        yield "race for a stale lock", trials.races


def queues(tally: Tally, number: int) -> Named:
    """Four queued and two temporary experiments while Aim's interface runs, so many times."""
    del tally
    for _ in range(number):
        yield "4 queued, 2 temporary experiments, aim up", experiments.at_once


PROOFS: dict[str, tuple[Callable[[Tally, int], Named], int]] = {
    "kills": (kills, 200),
    "sharded-kills": (partial(lost, how=signal.SIGKILL), 20),
    "sharded-stops": (partial(lost, how=signal.SIGSTOP), 20),
    "crashes": (crashes, 0),
    "damages": (damages, 200),
    "disks": (full_disks, 12),
    "writes": (full_at_each_write, 0),
    "races": (races, 400),
    "experiments": (queues, 1),
}
"""What is run, and how often."""


def main() -> int:
    """Run one proof; print its table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PROOFS)
    parser.add_argument("--number", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a regular expression that the names of trials must match")
    options = parser.parse_args()
    proof, number = PROOFS[options.name]
    draw, tally, zygote = random.Random(options.seed), Tally(), Zygote()
    with tempfile.TemporaryDirectory(prefix="dsv3-proof-", ignore_cleanup_errors=True) as root:
        trainings = Trainings(Path(root), zygote)
        for name, trial in proof(tally, options.number or number):
            if re.search(options.only, name):
                tally.attempt(name, trial, trainings, draw)
                print(tally.summary(), flush=True)
    zygote.close()
    print(tally.table())
    return int(tally.failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""Disturb small trainings at random, for as long as wanted, and compare what they give: `python -m tests.stress.soak`.

Every number is drawn from the seed, but for the moments at which the machine does what it is told. The table at the end
says what was done, how often, and how it ended; the exit status is 1 where there was a traceback, a hang or a
difference.
"""

import argparse
import collections
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.stress import disks, trials
from tests.stress.processes import Failure, Zygote
from tests.stress.trainings import Trainings

TRIALS: dict[str, trials.Trial] = {
    "kill -9": trials.kills,
    "kill -9 of two processes": trials.kills_of_two,
    "INT, TERM, HUP": trials.signals,
    "damaged checkpoint": trials.damages,
    "several at once": trials.crowds,
    "kill -9 while Aim is read": trials.trackers,
    "race for a stale lock": trials.races,
    "full disk": disks.full_disk,
}


class Tally:
    """What was done, how often, and how it ended."""

    def __init__(self) -> None:
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def attempt(self, name: str, trial: trials.Trial, trainings: Trainings, draw: random.Random) -> None:
        """Run one trial and count how it ended; tell a failure."""
        counts = self.counts[name]
        counts["trials"] += 1
        try:
            outcome = trial(trainings, draw)
        except Failure as failure:
            counts["failed"] += 1
            print(f"FAILED {name}: {failure}", file=sys.stderr, flush=True)
            return
        finally:
            trainings.clear()
        counts["disturbances"] += outcome.disturbances
        counts["identical"] += 1
        counts["told"] += len(outcome.lines)

    def reached(self, name: str) -> int:
        """How many trials of that name met what they were to meet, or failed."""
        return self.counts[name]["disturbances"] + self.counts[name]["failed"]

    @property
    def failed(self) -> int:
        """Trials that failed."""
        return sum(counts["failed"] for counts in self.counts.values())

    def summary(self) -> str:
        """One short line on how far it has come."""
        numbers = {name: sum(counts[name] for counts in self.counts.values()) for name in ("trials", "disturbances")}
        return f"{numbers['trials']} trials, {numbers['disturbances']} disturbances, {self.failed} failed"

    def table(self) -> str:
        """The table, in Markdown."""
        names = ("trials", "disturbances", "identical", "told", "failed")
        total = collections.Counter[str]()
        for counts in self.counts.values():
            total.update(counts)
        rows = [("what", "trials", "disturbances", "ended identical", "fell back or refused, one line", "failed")]
        rows += [("---", *["---:"] * len(names))]
        rows += [(what, *[str(counts[name]) for name in names]) for what, counts in self.counts.items()]
        rows += [("**all**", *[str(total[name]) for name in names])]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    """Run trials until the time is over; print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(TRIALS), action="append", help="one kind of trial; may be repeated")
    options = parser.parse_args()
    draw, tally, zygote = random.Random(options.seed), Tally(), Zygote()
    chosen = {name: trial for name, trial in TRIALS.items() if not options.only or name in options.only}
    with tempfile.TemporaryDirectory(prefix="dsv3-soak-", ignore_cleanup_errors=True) as root:
        trainings = Trainings(Path(root), zygote)
        trainings.check_zygote()
        end = time.monotonic() + 60 * options.minutes
        while time.monotonic() < end:
            for name, trial in chosen.items():
                if time.monotonic() < end:
                    tally.attempt(name, trial, trainings, draw)
    zygote.close()
    print(tally.table())
    return int(tally.failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""What can happen to a training: each trial does it once and checks that nothing was lost, and nothing wrong accepted.

A trial returns how many disturbances it made and the lines in which a training told that it fell back; what must never
happen raises `Failure`. It leaves no process.
"""

import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dsv3.errors import LOST_PROCESS_STATUS
from tests.damage import DAMAGES
from tests.stress.processes import Failure, Process, wait_until
from tests.stress.trainings import FORMS, Trainings

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
FALLBACK = re.compile(r"^.*not resumed, damaged: .*; set aside as damaged_step_\d+$", re.MULTILINE)


@dataclass
class Outcome:
    """What one trial did."""

    disturbances: int = 0
    lines: list[str] = field(default_factory=list)
    """Those that told a fallback or a refusal."""


Trial = Callable[[Trainings, random.Random], Outcome]


def some_time(trainings: Trainings, draw: random.Random, form: str, num_processes: int = 1) -> float:
    """A time in which a training gets anywhere between its first line and its export; early moments more often."""
    trainings.undisturbed(form, num_processes)
    return trainings.fastest[form, num_processes] * draw.random() ** 1.5


def any_form(draw: random.Random) -> str:
    return draw.choice(list(FORMS))


def kills(trainings: Trainings, draw: random.Random) -> Outcome:
    """Kill a training in some form."""
    return killed(trainings, draw, any_form(draw))


def killed(trainings: Trainings, draw: random.Random, form: str) -> Outcome:
    """Kill a training at random moments, some times or until one attempt ends by itself; then let it end."""
    folder, outcome = trainings.fresh(form, save_steps=draw.choice([1, 3])), Outcome()
    for _ in range(draw.randint(2, 8)):
        process = trainings.start(folder)
        time.sleep(some_time(trainings, draw, form))
        process.send(signal.SIGKILL)
        status = process.status(10.0)
        if status == 0:
            break
        if status != -signal.SIGKILL:
            raise Failure(f"status {status}\n{process.text()}")
        outcome.disturbances += 1
    trainings.finish(folder)
    trainings.check(form, folder)
    return outcome


def kills_of_two(trainings: Trainings, draw: random.Random) -> Outcome:
    """Kill a training with two processes in some form."""
    return killed_two(trainings, draw, any_form(draw))


def killed_two(trainings: Trainings, draw: random.Random, form: str) -> Outcome:
    """Kill one or both of two workers, and then, as the launcher does, the other."""
    folder, outcome = trainings.fresh(form, save_steps=draw.choice([1, 3])), Outcome()
    for _ in range(draw.randint(1, 3)):
        processes = trainings.start_two(folder)
        time.sleep(some_time(trainings, draw, form, 2))
        draw.shuffle(processes)
        for number, process in enumerate(processes):
            if number:
                time.sleep(draw.choice([0.0, 0.2]))
            process.send(signal.SIGKILL)
        statuses = [process.status(10.0) for process in processes]
        outcome.disturbances += -signal.SIGKILL in statuses
    trainings.finish(folder, num_processes=2)
    trainings.check(form, folder, num_processes=2)
    return outcome


def lost_one(trainings: Trainings, draw: random.Random, form: str, number: signal.Signals) -> Outcome:
    """Kill or stop one of two processes that share a training; the other ends by itself, with a line; it goes on."""
    folder = trainings.fresh(form, save_steps=draw.choice([1, 3]))
    trainings.undisturbed(form, 2)
    processes = trainings.start_two(folder)
    wait_until(lambda: any("runs " in each.text() or each.status() is not None for each in processes))
    time.sleep(draw.random() * 0.6 * trainings.fastest[form, 2])  # the rest is its start
    draw.shuffle(processes)
    victim, survivor = processes
    victim.send(number)
    status, text = survivor.ended(60.0)
    victim.send(signal.SIGKILL)
    was_lost = victim.status(10.0) == -signal.SIGKILL
    if status not in (0, LOST_PROCESS_STATUS) or (status and text.count("dvc repro goes on from the last") != 1):
        raise Failure(f"status {status}\n{text}")
    trainings.finish(folder, num_processes=2)
    trainings.check(form, folder, num_processes=2)
    return Outcome(int(was_lost and status != 0))


def signals(trainings: Trainings, draw: random.Random) -> Outcome:
    """Ask a training to stop, once; it saves, and goes on when it is started again."""
    form = any_form(draw)
    folder, outcome = trainings.fresh(form), Outcome()
    process = trainings.start(folder)
    wait_until(lambda: "runs " in process.text() or process.status() is not None, 60.0)
    time.sleep(some_time(trainings, draw, form))
    number = draw.choice(list(SIGNALS))
    process.send(number)
    status, text = process.ended()
    if status not in (0, SIGNALS[number], -number):
        raise Failure(f"status {status} after {number.name}\n{text}")
    outcome.disturbances += status != 0
    trainings.finish(folder)
    trainings.check(form, folder)
    return outcome


def stopped(trainings: Trainings, form: str) -> Path:
    """The folder of a training that was killed when it had two checkpoints."""
    folder = trainings.fresh(form, save_steps=2)
    process = trainings.start(folder)
    wait_until(lambda: len(list(folder.glob(".checkpoints/*/step_*/complete"))) == 2 or process.status() is not None)
    process.send(signal.SIGKILL)
    process.status(10.0)
    return folder


def saved_files(folder: Path) -> list[Path]:
    """The files of all checkpoints."""
    return sorted(path for path in folder.glob(".checkpoints/*/*_*/*") if path.is_file())


def damages(trainings: Trainings, draw: random.Random) -> Outcome:
    """Damage one file of a stopped training."""
    form = any_form(draw)
    folder = stopped(trainings, form)
    return damaged(trainings, form, folder, draw.choice(saved_files(folder)), draw.choice(list(DAMAGES)))


def damaged(trainings: Trainings, form: str, folder: Path, file: Path, damage: str) -> Outcome:
    """Damage that file; the training goes on from an older checkpoint, with a line, or did not need it."""
    DAMAGES[damage](file)
    lines = FALLBACK.findall(trainings.finish(folder))
    trainings.check(form, folder)
    return Outcome(1, lines)


def crowds(trainings: Trainings, draw: random.Random) -> Outcome:
    """Start several trainings at once, two of them the same: one of these two is refused, all others end well."""
    forms = draw.sample(list(FORMS), 2)
    folders = [trainings.fresh(form) for form in forms]
    processes = [trainings.start(folder) for folder in (*folders, folders[0])]
    statuses, texts = zip(*(process.ended() for process in processes), strict=True)
    refused = [text for status, text in zip(statuses, texts, strict=True) if status == 2]
    if any("another training with the same parameters is running" not in text for text in refused):
        raise Failure("\n".join(refused))
    if statuses[1] or 0 not in (statuses[0], statuses[2]):
        raise Failure(f"statuses {statuses}\n" + "\n".join(texts))
    for form, folder in zip(forms, folders, strict=True):
        trainings.check(form, folder)
    return Outcome(1, refused)


def trackers(trainings: Trainings, draw: random.Random) -> Outcome:
    """Kill a training that Aim shows, while others open and close the same runs."""
    form = any_form(draw)
    folder, outcome = trainings.fresh(form, trackers=["aim"]), Outcome()
    readers: list[Process] = []
    for _ in range(draw.randint(1, 3)):
        process = trainings.start(folder, DVC_STAGE="train")
        wait_until((folder / ".aim" / "VERSION").is_file, 60.0)
        readers.append(trainings.zygote.start("tests.stress.aim_reader", [str(folder)], folder))
        time.sleep(some_time(trainings, draw, form))
        process.send(signal.SIGKILL)
        outcome.disturbances += process.status(10.0) == -signal.SIGKILL
    trainings.finish(folder)
    trainings.check(form, folder)
    for reader in readers:
        reader.finished()
    return outcome


def races(trainings: Trainings, draw: random.Random) -> Outcome:
    """Let several take a lock at the same moment that a killed process has left; the winner is killed in its turn."""
    folder = trainings.root / "races"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    start = time.time() + 0.3
    racers = [
        trainings.zygote.start("tests.stress.racer", [str(folder), str(start), str(draw.uniform(0, 0.002))], folder)
        for _ in range(6)
    ]
    texts = [racer.text() for racer in racers if racer.status(20.0) is not None]
    won = [text for text in texts if text.startswith("won")]
    if len(won) < 1 or any("two holders" in text for text in texts) or len(texts) < len(racers):
        raise Failure("\n".join(texts))
    return Outcome(len(racers), [text for text in texts if text.startswith("lost")])

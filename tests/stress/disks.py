"""Full disks: any stage on a small file system of its own, with any number of bytes free.

The file system is a tmpfs, which needs the right to mount one. Where that is missing, nothing is tried, and it is said.
"""

import importlib.util
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ruamel.yaml import YAML

from dsv3.artifacts import sha256_file
from tests.committed import PROJECT
from tests.dvc_yaml import STAGES, arguments_of, outputs_of
from tests.pipeline.laboratory import SIZES, verses
from tests.stress.processes import Failure, Process
from tests.stress.trainings import TIMES, Trainings
from tests.stress.trials import Outcome
from tests.stress.zygote import BALLAST
from tests.training_inputs import MICRO, write_json

SIZE_BYTES = 64 << 20
PAGE_BYTES = 4096
BOUND_S = 30.0
"""Longest time from the start of a stage that finds no room to its end, beside what the stage itself takes."""

VARYING = {"metrics.json", "headline.json", "run.json", "history.tsv"}
"""Files with times in them."""

TOLD = re.compile(r"the disk is full|No space left on device")


HAS_AIM = importlib.util.find_spec("aim") is not None


@cache
def can_mount() -> bool:
    """Whether this process may mount a file system; says so where it may not."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder)):
                return True
        except (OSError, subprocess.CalledProcessError):
            print("full disks are not tried: that needs the right to mount a tmpfs", flush=True)
            return False


@contextmanager
def small_disk(root: Path) -> Iterator[Path]:
    """Mount a small file system at `root`/disk within the block."""
    disk = root / "disk"
    disk.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={SIZE_BYTES}"]
    subprocess.run(["mount", *options, "tmpfs", disk], check=True, capture_output=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def leave_free(disk: Path, num_bytes: int) -> None:
    """Fill the disk but for so many bytes, in whole pages."""
    rest = shutil.disk_usage(disk).free - num_bytes
    if rest > 0:
        with (disk / BALLAST).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, rest)


def write_pipeline(root: Path, with_aim: bool) -> None:
    """Write what the first stage needs."""
    (root / "verses.txt").write_text(verses(400), encoding="utf-8")
    write_json(root / "config.json", {**MICRO, "num_nextn_predict_layers": 0})
    yaml = YAML()
    params = yaml.load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    for section, values in SIZES.items():
        params[section].update(values)
    params["model"]["config"] = str(root / "config.json")
    params["data"]["path"] = str(root / "verses.txt")
    params["train"].update(max_steps=6, eval_steps=3)
    params["runtime"].update(save_steps=2, trackers=["aim"] if with_aim else [])
    with (root / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)


def start(trainings: Trainings, disk: Path, stage: str, full_at: int = 0) -> Process:
    """Start a stage whose files, and DVC's root, are on the disk; what it says goes elsewhere."""
    given = [*arguments_of(STAGES[stage]), "--params", "params.yaml"]
    words = [word if word.startswith("--") else str(disk / word) for word in given]
    return trainings.zygote.start(f"stages.{stage}", words, disk, full_at=full_at, DVC_STAGE=stage)


class Pipeline:
    """The stages run once, with room: what each began with, how much it wrote, and what it gave."""

    def __init__(self, trainings: Trainings, with_aim: bool) -> None:
        self.trainings = trainings
        self.before: dict[str, Path] = {}
        self.written: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.given: dict[str, dict[str, object]] = {}
        kept = trainings.kept / f"pipeline{int(with_aim)}"
        with small_disk(trainings.kept) as disk:
            write_pipeline(disk, with_aim)
            for stage in STAGES:
                self.before[stage] = Path(shutil.copytree(disk, kept / stage))
                used, began = shutil.disk_usage(disk).used, time.monotonic()
                start(trainings, disk, stage).finished()
                self.seconds[stage] = time.monotonic() - began
                self.written[stage] = shutil.disk_usage(disk).used - used
                self.given[stage] = contents(disk, stage)

    def attempt(self, stage: str, free: int | None = None, full_at: int = 0) -> list[str] | None:
        """Run a stage on a disk that fills up, then with room; return the lines in which it told that.

        The disk has `free` bytes from the start, or is filled before change `full_at` of its files; None where the
        stage makes fewer. A stage whose own files fit and whose tracker's don't succeeds, and tells it.
        """
        when = f"{stage}, {free} bytes free" if free is not None else f"{stage}, full before change {full_at}"
        with small_disk(self.trainings.kept) as disk:
            shutil.copytree(self.before[stage], disk, dirs_exist_ok=True)
            if free is not None:
                leave_free(disk, free)
            status, text = start(self.trainings, disk, stage, full_at).ended(BOUND_S + 2 * self.seconds[stage])
            lines = text.strip().splitlines()
            if status and not (status == 2 and TOLD.search(lines[-1])):
                raise Failure(f"{when}: status {status}\n{text}")
            if full_at and not (disk / BALLAST).exists():
                return None
            (disk / BALLAST).unlink(missing_ok=True)
            if status:
                start(self.trainings, disk, stage).finished()
            for name, content in contents(disk, stage).items():
                if self.given[stage].get(name) != content:
                    raise Failure(f"{when}: {name} differs\n{text}")
            left = [str(path) for path in disk.rglob(".*.tmp")]
            if left:
                raise Failure(f"{when}: left {left}")
            told = [line for line in lines if TOLD.search(line)]
            return [f"{when}: {told[-1]}"] if told else []


def contents(disk: Path, stage: str) -> dict[str, object]:
    """What the stage has written, by name: digests, and the history without times."""
    found: dict[str, object] = {}
    for output in sorted(outputs_of(STAGES[stage])):
        for path in [disk / output, *(disk / output).rglob("*")]:
            if path.is_file() and path.name not in VARYING:
                found[str(path.relative_to(disk))] = sha256_file(path)
    if stage == "train":
        header, *rows = [line.split("\t") for line in (disk / "results/train/history.tsv").read_text().splitlines()]
        found["history"] = [[cell for name, cell in zip(header, row, strict=True) if name not in TIMES] for row in rows]
    return found


def full_disk(trainings: Trainings, draw: random.Random) -> Outcome:
    """Run a random stage on a disk with a random number of bytes free."""
    if not can_mount():
        return Outcome()
    pipeline = undisturbed(trainings, with_aim=HAS_AIM and draw.random() < 0.5)
    stage = draw.choice(list(STAGES))
    pages = draw.choice([0, 1, draw.randint(0, 1 + pipeline.written[stage] // PAGE_BYTES)])
    lines = pipeline.attempt(stage, pages * PAGE_BYTES) or []
    return Outcome(len(lines), lines)


@cache
def undisturbed(trainings: Trainings, with_aim: bool) -> Pipeline:
    """The pipeline as it runs with room."""
    return Pipeline(trainings, with_aim)

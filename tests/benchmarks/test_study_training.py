import os
import signal
import subprocess
import threading
import time

import pytest

from benchmarks import study
from benchmarks.studies import training
from benchmarks.studies.training import LOGS, MODELS, Job, experiments, train
from dsv3.errors import Interrupted, UserError

DVC = """#!/bin/sh
case "$*" in
*list*) echo known-1; exit 0 ;;
get*) echo "get $3 $5" >> calls; mkdir "$7"; exit ;;
esac
name=$5
echo "start $name $OMP_NUM_THREADS" >> calls
echo "Running stage 'train':"
case "$name" in
*slow*) trap 'echo "saved $name" >> calls; exit 130' INT; touch "$name.ready"; while :; do sleep 0.05; done ;;
*bad*) exit 1 ;;
esac
echo "$@" > "$name.arguments"
"""


@pytest.fixture(autouse=True)
def fake_dvc(tmp_path, monkeypatch):
    """A dvc on the PATH that trains nothing."""
    script = tmp_path / "bin" / "dvc"
    script.parent.mkdir()
    script.write_text(DVC)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls(folder) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_each_run_is_an_experiment_in_a_folder_of_its_own_with_its_share_of_the_cores(fake_dvc, capsys):
    train({"a": Job(["-S", "seed=1"]), "b": Job([])}, num_at_once=2, num_threads=3, message="how")
    assert sorted(calls(fake_dvc)) == ["start a 3", "start b 3"]
    assert (fake_dvc / "a.arguments").read_text() == "exp run --temp --name a --message how -S seed=1\n"
    assert sorted(line.split()[1] for line in capsys.readouterr().out.splitlines()) == ["a", "b"]
    assert experiments() == {"known-1"}


def test_a_failed_run_stops_no_other_and_is_named_at_the_end(fake_dvc):
    with pytest.raises(UserError, match=rf"^1 of 2 runs failed: bad; see {LOGS}/$"):
        train({"bad": Job([]), "good": Job([])}, num_at_once=1, num_threads=1, message="")
    assert (fake_dvc / "good.arguments").exists()


@pytest.fixture
def experiment(fake_dvc):
    """Makes an experiment of a commit, as DVC keeps it: a reference by the commit and the name."""
    author = ["-c", "user.name=n", "-c", "user.email=e@x"]
    for arguments in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *arguments], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    def make(name: str) -> str:
        subprocess.run(["git", "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", head], check=True)
        return head

    return make


def test_a_student_is_trained_after_its_teachers_from_copies_of_their_models(fake_dvc, experiment):
    commit, _ = (experiment(name) for name in ("first", "second"))
    jobs = {"student": Job(["-S", "seed=3"], ["first", "second"]), "first": Job([]), "second": Job([])}
    train(jobs, num_at_once=2, num_threads=1, message="how")
    seen = calls(fake_dvc)
    assert seen[2:] == [f"get outputs/final_model {commit}"] * 2 + ["start student 1"]
    folders = [MODELS / f"{name}-{commit[:12]}" for name in ("first", "second")]
    assert all(folder.is_dir() for folder in folders)
    assert (
        (fake_dvc / "student.arguments")
        .read_text()
        .endswith(f"-S seed=3 -S train.teachers=[{folders[0]},{folders[1]}]\n")
    )
    assert sorted(MODELS.iterdir()) == folders, "nothing half copied stays"
    train({"another": Job([], ["first"])}, num_at_once=1, num_threads=1, message="how")
    assert calls(fake_dvc)[-2:] == ["start student 1", "start another 1"], "a copy that is there serves again"


def test_a_run_waits_for_its_own_teachers_alone(fake_dvc, experiment):
    experiment("first")
    jobs = {"student": Job([], ["first"]), "other": Job([]), "first": Job([])}
    train(jobs, num_at_once=1, num_threads=1, message="")
    starts = [line.split()[1] for line in calls(fake_dvc) if line.startswith("start")]
    assert starts == ["other", "first", "student"]


def test_a_student_whose_teacher_failed_is_not_begun_and_is_named(fake_dvc):
    jobs = {"bad": Job([]), "student": Job([], ["bad"]), "its student": Job([], ["student"]), "good": Job([])}
    expected = rf"^1 of 4 runs failed: bad; not begun without them: student, its student; see {LOGS}/$"
    with pytest.raises(UserError, match=expected):
        train(jobs, num_at_once=2, num_threads=1, message="")
    assert (fake_dvc / "good.arguments").exists()


def test_a_student_whose_teacher_dvc_does_not_hold_fails_with_the_place_of_its_words(fake_dvc, experiment, capsys):
    experiment("another")
    with pytest.raises(UserError, match=r"^1 of 1 runs failed: student; see"):
        train({"student": Job([], ["lost"])}, num_at_once=1, num_threads=1, message="")
    assert f"student has no teachers, see {LOGS / 'student.log'}" in capsys.readouterr().out
    assert "lost is no experiment of the checked-out commit" in (LOGS / "student.log").read_text()
    assert not (fake_dvc / "calls").exists(), "neither is another model copied, nor a training begun"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_what_runs_save_and_starts_nothing_more(fake_dvc, number):
    def interrupt() -> None:
        while not all((fake_dvc / f"slow{i}.ready").exists() for i in (1, 2)):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted, match="the same command goes on"):
        train({name: Job([]) for name in ("slow1", "slow2", "later")}, num_at_once=2, num_threads=1, message="")
    assert sorted(calls(fake_dvc)) == ["saved slow1", "saved slow2", "start slow1 1", "start slow2 1"]


@pytest.mark.parametrize(("jobs", "threads", "expected"), [(2, None, 3), (2, 1, 1), (1, 4, 4), (9, None, 1)])
def test_a_training_has_its_share_of_the_cores_or_the_threads_that_are_asked_for(monkeypatch, jobs, threads, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    given = []
    monkeypatch.setattr(training, "train", lambda *arguments: given.append(arguments))
    study.run("ablations", jobs=jobs, threads=threads, set_param=["data.source=plays"])
    runs, at_once, num_threads, message = given[0]
    assert (at_once, num_threads) == (jobs, expected)
    assert message.startswith(f"{jobs} at a time, {expected} thread(s) each, ")
    assert all(job.flags[-2:] == ["-S", "data.source=plays"] for job in runs.values()) and len(runs) == 30


def test_without_dvc_on_the_path_the_remedy_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"source \.venv/bin/activate"):
        experiments()

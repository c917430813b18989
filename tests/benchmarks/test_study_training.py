import os
import signal
import threading
import time

import pytest

from benchmarks import study
from benchmarks.studies import training
from benchmarks.studies.training import LOGS, experiments, train
from dsv3.errors import Interrupted, UserError

DVC = """#!/bin/sh
case "$*" in
*list*) echo known-1; exit 0 ;;
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
    train({"a": ["-S", "seed=1"], "b": []}, num_at_once=2, num_threads=3, message="how")
    assert sorted(calls(fake_dvc)) == ["start a 3", "start b 3"]
    assert (fake_dvc / "a.arguments").read_text() == "exp run --temp --name a --message how -S seed=1\n"
    assert sorted(line.split()[1] for line in capsys.readouterr().out.splitlines()) == ["a", "b"]
    assert experiments() == {"known-1"}


def test_a_failed_run_stops_no_other_and_is_named_at_the_end(fake_dvc):
    with pytest.raises(UserError, match=rf"^1 of 2 runs failed: bad; see {LOGS}/$"):
        train({"bad": [], "good": []}, num_at_once=1, num_threads=1, message="")
    assert (fake_dvc / "good.arguments").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_what_runs_save_and_starts_nothing_more(fake_dvc, number):
    def interrupt() -> None:
        while not all((fake_dvc / f"slow{i}.ready").exists() for i in (1, 2)):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted, match="the same command goes on"):
        train({"slow1": [], "slow2": [], "later": []}, num_at_once=2, num_threads=1, message="")
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
    assert all(flags[-2:] == ["-S", "data.source=plays"] for flags in runs.values()) and len(runs) == 30


def test_without_dvc_on_the_path_the_remedy_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"source \.venv/bin/activate"):
        experiments()

import csv
import gc
import json
import logging
import re
import subprocess
import sys
import threading
import tomllib
import weakref
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from dsv3.errors import UserError
from dsv3.params.runtime import TrackerName
from dsv3.tracking.events import Result, Row, Text
from dsv3.tracking.recorder import Recorder, add_to_run, identity_of, open_recorder, read_record
from dsv3.tracking.tracker import OPEN_S, IsolatedTracker, OpenTrackers, remedy

ROOT = Path(__file__).parents[3]


class Memory:
    """A tracker that remembers its calls, and fails in the methods that it is told to."""

    def __init__(self, fails_in=(), gives_hash=None, has_rows=False):
        self.calls, self.fails_in, self.gives_hash, self.has_rows = [], fails_in, gives_hash, has_rows

    def _call(self, method, *arguments):
        self.calls.append((method, *arguments))
        if method in self.fails_in:
            raise OSError("disk full")

    def open(self, identity, run_hash, mode):
        self._call("open", run_hash, mode)
        return self.gives_hash

    def write(self, event):
        self._call("write", event)

    def close(self, status):
        self._call("close", status)

    def rows(self):
        return [call[1] for call in self.calls if call[0] == "write" and isinstance(call[1], Row)]


def trackers_of(identity, *trackers) -> OpenTrackers:
    return OpenTrackers(
        [IsolatedTracker("aim", lambda tracker=tracker: tracker) for tracker in trackers], identity, None, "train"
    )


def recorder_of(directory: Path, identity, *trackers) -> Recorder:
    return Recorder(directory, identity, trackers_of(identity, *trackers))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_a_row_is_on_the_disk_when_log_returns(tmp_path, identity):
    recorder = recorder_of(tmp_path, identity)
    recorder.log("history", {"step": 10, "loss": 4.25, "learning_rate": 1e-3})
    assert table(tmp_path / "history.tsv") == [{"step": "10", "loss": "4.25", "learning_rate": "0.001"}]
    recorder.log("router", {"step": 10, "layer": 1, "max_vio": 0.5})
    assert table(tmp_path / "router.tsv") == [{"step": "10", "layer": "1", "max_vio": "0.5"}]


def test_every_table_exists_from_the_start_with_its_index(tmp_path, identity):
    recorder_of(tmp_path, identity)
    assert (tmp_path / "history.tsv").read_text() == "step\n"
    assert (tmp_path / "router.tsv").read_text() == "step\tlayer\n"


def test_a_column_that_appears_late_is_empty_in_earlier_rows(tmp_path, identity):
    recorder = recorder_of(tmp_path, identity)
    recorder.log("history", {"step": 1, "learning_rate": 0.1})
    recorder.log("history", {"step": 2, "loss": 3.0, "learning_rate": 0.2})
    recorder.log("history", {"step": 3, "loss": 2.0})
    assert (tmp_path / "history.tsv").read_text() == "step\tloss\tlearning_rate\n1\t\t0.1\n2\t3\t0.2\n3\t2\t\n"


def test_a_float32_survives_the_file_exactly(tmp_path, identity):
    recorder = recorder_of(tmp_path, identity)
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    for step, value in enumerate(values):
        recorder.log("history", {"step": step, "loss": value})
    assert [np.float32(row["loss"]) for row in table(tmp_path / "history.tsv")] == list(values)


def test_an_unknown_name_table_or_missing_index_is_refused(tmp_path, identity):
    recorder = recorder_of(tmp_path, identity)
    with pytest.raises(AssertionError, match="lost"):
        recorder.log("history", {"step": 1, "lost": 2.0})
    with pytest.raises(AssertionError, match="no table"):
        recorder.log("hystory", {"step": 1})
    with pytest.raises(AssertionError, match="layer"):
        recorder.log("router", {"step": 1, "max_vio": 2.0})


def test_a_later_stages_result_with_an_unknown_name_is_refused(tmp_path, params):
    result = Result("evaluate", {"test": {"nats_per_token": 2.0, "accuracy": 0.5}}, 10)
    with pytest.raises(AssertionError, match=r"^not in dsv3/tracking/metrics.py: accuracy$"):
        add_to_run(tmp_path / "run.json", params, [result])


def test_a_resumed_run_rewrites_its_files_up_to_the_checkpoint(tmp_path, identity):
    first = recorder_of(tmp_path, identity)
    first.log("history", {"step": 1, "loss": 3.0})
    state = json.loads(json.dumps(first.state()))  # as a checkpoint stores it
    first.log("history", {"step": 2, "loss": 2.0})  # after the checkpoint, lost with the process
    second = recorder_of(tmp_path, identity)
    second.restore(state)
    second.log("history", {"step": 2, "loss": 2.5})
    assert (tmp_path / "history.tsv").read_text() == "step\tloss\n1\t3\n2\t2.5\n"
    assert second.state()["history"] == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


def test_only_a_tracker_that_lost_the_rows_is_shown_them_again(tmp_path, identity):
    fresh, resumed = Memory(), Memory(has_rows=True)
    recorder_of(tmp_path, identity, fresh, resumed).restore({"history": [{"step": 1, "loss": 3.0}]})
    assert fresh.rows() == [Row("history", {"step": 1, "loss": 3.0})]
    assert resumed.rows() == []


def test_a_failing_tracker_warns_once_and_stops_nothing(tmp_path, identity, caplog):
    failing, healthy = Memory(fails_in=("write", "close")), Memory()
    recorder = recorder_of(tmp_path, identity, failing, healthy)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            recorder.log("history", {"step": step, "loss": 1.0})
        recorder.show(Text("sample", "To be", 3))
        recorder.close("finished")
    assert len(caplog.messages) == 1
    assert "tracker aim failed (OSError: disk full); the run goes on" in caplog.messages[0]
    assert len(failing.rows()) == len(healthy.rows()) == len(table(tmp_path / "history.tsv")) == 3


class NeverReturning(Memory):
    """A tracker of which one method waits, as Aim's do for a server that is gone and on a full disk."""

    def __init__(self, method):
        super().__init__()
        self.method, self.end = method, threading.Event()

    def _call(self, method, *arguments):
        super()._call(method, *arguments)
        if method == self.method:
            self.end.wait()


@pytest.mark.parametrize("method", ["open", "write", "close"])
def test_a_tracker_that_never_answers_is_left_behind_after_one_wait(tmp_path, identity, caplog, monkeypatch, method):
    monkeypatch.setattr("dsv3.tracking.tracker.CALL_S", 2.0)
    monkeypatch.setitem(OPEN_S, "aim", 2.0)
    monkeypatch.setattr("dsv3.tracking.tracker.gc.collect", lambda: 0)  # of all that pytest holds: seconds under load
    skipped = []
    monkeypatch.setattr("dsv3.tracking.tracker.skip_shutdown", lambda: skipped.append(True))
    hanging, healthy = NeverReturning(method), Memory()
    recorder = recorder_of(tmp_path, identity, hanging, healthy)
    for step in (1, 2):
        recorder.log("history", {"step": step, "loss": 1.0})
    recorder.close("finished")
    hanging.end.set()
    (message,) = caplog.messages
    assert "tracker aim failed (TimeoutError: no answer within 2 s); the run goes on" in message
    assert [call[0] for call in hanging.calls][-1] == method
    assert [call[0] for call in healthy.calls] == ["open", "write", "write", "close"]
    assert skipped == [True]


HANGING_COMMAND = """
import threading
from dsv3.cli import command, skip_shutdown
from dsv3.errors import UserError

def main() -> None:
    threading.Thread(target=threading.Event().wait).start()  # Python waits for it at its end: it is no daemon
    skip_shutdown()
    print("saved")
    {fails}

command(main)
"""


@pytest.mark.parametrize(
    ("fails", "status", "told"),
    [
        ("", 0, ""),
        ('raise UserError("a mistake")', 2, "a mistake"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_command_ends_with_its_own_status_despite_a_thread_that_hangs(fails, status, told):
    program = HANGING_COMMAND.format(fails=fails)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert done.stdout == "saved\n"
    assert "".join(done.stderr.splitlines()[-1:]) == told


def test_a_tracker_that_has_failed_is_not_waited_for_at_the_end_of_the_process(tmp_path, identity, monkeypatch):
    skipped = []
    monkeypatch.setattr("dsv3.tracking.tracker.skip_shutdown", lambda: skipped.append(True))
    recorder = recorder_of(tmp_path, identity, Memory(fails_in=("write",)))
    assert not skipped
    recorder.log("history", {"step": 1, "loss": 1.0})
    assert skipped


@pytest.mark.parametrize("method", ["open", "write"])
def test_a_tracker_that_has_failed_is_not_collected_which_would_close_it(tmp_path, identity, method):
    """Aim's runs close themselves, in whatever thread collects them; on a full disk that never returned."""
    tracker = Memory(fails_in=(method,))
    left = weakref.ref(tracker)
    recorder = recorder_of(tmp_path, identity, tracker)
    recorder.log("history", {"step": 1, "loss": 1.0})
    recorder.close("failed")
    del tracker, recorder
    gc.collect()
    assert left() is not None


def test_a_tracker_is_freed_in_its_own_thread(tmp_path, identity):
    class Freed(Memory):
        def __del__(self):
            threads.append(threading.current_thread())

    threads: list[threading.Thread] = []
    made = [Freed()]
    made[0].itself = made[0]  # a cycle, as Aim's objects are
    trackers = OpenTrackers([IsolatedTracker("aim", made.pop)], identity, None, "train")
    trackers.close("finished")
    assert len(threads) == 1 and threads[0] is not threading.main_thread()


def test_an_older_checkpoints_rows_are_kept_under_the_names_of_today(tmp_path, identity):
    tracker = Memory()
    recorder = recorder_of(tmp_path, identity, tracker)
    recorder.restore({"router": [{"step": 10, "layer": 1, "loads": "0.5 0.5"}]})
    assert table(tmp_path / "router.tsv") == [{"step": "10", "layer": "1", "load_shares": "0.5 0.5"}]
    assert [row.cells for row in tracker.rows()] == [{"step": 10, "layer": 1, "load_shares": "0.5 0.5"}]


def test_trackers_are_closed_where_the_tables_cannot_be_written(tmp_path, identity, params, monkeypatch):
    tracker = Memory()
    monkeypatch.setattr("dsv3.tracking.recorder.open_trackers", lambda *_: trackers_of(identity, tracker))
    monkeypatch.setattr(Recorder, "write_tables", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_recorder(tmp_path, params.runtime, identity)
    assert tracker.calls[-1] == ("close", "failed")


def test_a_tracker_that_cannot_be_opened_is_left_alone(tmp_path, identity, caplog):
    dead = Memory(fails_in=("open",))
    recorder = recorder_of(tmp_path, identity, dead)
    recorder.log("history", {"step": 1, "loss": 1.0})
    recorder.close("finished")
    assert [call[0] for call in dead.calls] == ["open"]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("method", ["load", "open", "write", "close"])
def test_a_tracker_that_would_end_the_process_stops_nothing(tmp_path, identity, caplog, method):
    class Leaving(Memory):
        def _call(self, called, *arguments):
            if called == method:
                sys.exit(1)

    def load():
        return sys.exit(1) if method == "load" else Leaving()

    recorder = Recorder(tmp_path, identity, OpenTrackers([IsolatedTracker("wandb", load)], identity, None, "train"))
    recorder.log("history", {"step": 1, "loss": 1.0})
    recorder.close("finished")
    assert len(table(tmp_path / "history.tsv")) == 1
    assert [message.split(";")[0] for message in caplog.messages] == ["tracker wandb failed (SystemExit: 1)"]


def test_the_hash_of_the_first_tracker_names_the_run_in_the_others(tmp_path, identity):
    aim, other = Memory(gives_hash="abc"), Memory()
    recorder = recorder_of(tmp_path, identity, aim, other)
    assert other.calls == [("open", "abc", "train")]
    assert recorder.run_record()["aim_run_hash"] == recorder.run_hash == "abc"


def test_the_record_is_json_holds_no_machine_path_and_gives_the_identity_back(tmp_path, identity):
    record = json.loads(json.dumps(recorder_of(tmp_path, identity).run_record()))
    assert identity_of(record) == identity
    assert record["aim_repo"] == ".aim"
    assert record["fingerprint"] == "f" * 64
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize("name", ["git_sha", "git_dirty"])
def test_a_record_whose_commit_is_none_is_told_in_one_line(tmp_path, identity, name):
    record = recorder_of(tmp_path, identity).run_record() | {"step": 1}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert read_record(tmp_path / "run.json") == record
    (tmp_path / "run.json").write_text(json.dumps(record | {"dvc": {**record["dvc"], name: 5}}))
    with pytest.raises(UserError, match=rf"run\.json: dvc\.{name}: "):
        read_record(tmp_path / "run.json")


@pytest.mark.parametrize("name", get_args(TrackerName))
def test_a_tracker_whose_package_is_missing_or_broken_costs_a_line_with_the_remedy(
    tmp_path, identity, params, monkeypatch, caplog, name
):
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delitem(sys.modules, f"dsv3.tracking.{name}", raising=False)
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    recorder = open_recorder(tmp_path / "results", params.runtime.model_copy(update={"trackers": [name]}), identity)
    recorder.log("history", {"step": 1, "loss": 3.0})
    recorder.close("finished")
    (message,) = caplog.messages
    assert f"tracker {name} failed (ModuleNotFoundError: " in message
    assert f"pip install -c constraints.txt {name}" in message
    assert f"python -m dsv3.tracking.rebuild --tracker {name}" in message
    assert (tmp_path / "results" / "history.tsv").read_text() == "step\tloss\n1\t3\n"


@pytest.mark.parametrize("name", get_args(TrackerName))
def test_a_tracker_has_one_name_as_parameter_module_and_package(name):
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    requirements = [line for group in groups.values() for line in group if isinstance(line, str)]
    assert (ROOT / "dsv3" / "tracking" / f"{name}.py").is_file()
    assert any(re.match(rf"{name}\W", requirement) for requirement in requirements)


def test_where_aim_has_no_wheels_other_ways_are_told(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert remedy("aim").endswith("set runtime.trackers to [tensorboard], or use Python 3.12")
    assert remedy("wandb").startswith("pip install")

import json
import sys

import pytest

from dsv3 import progress
from dsv3.progress import LINE_S, Lines, ProgressMode, counted, shown_progress, text_of

VALUES = {"loss": 3.91234, "tok/s": 6842.3}


def test_numbers_are_short():
    assert [text_of(value) for value in (3.91234, 7.6e-3, 6842.3, 1234567)] == ["3.912", "0.0076", "6,842", "1,234,567"]


def test_outside_a_terminal_lines_come_at_a_humane_rate(capsys):
    now = 0.0
    lines = Lines("train", 1000, "step", 0, clock=lambda: now)
    for done in range(1, 1001):
        now += 0.25
        lines.update(done, VALUES)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == int(250 / LINE_S) + 1
    assert printed[0] == "train: step 60 of 1,000, 03:55 left, loss 3.912, tok/s 6,842"
    assert printed[-1].startswith("train: step 1,000 of 1,000, 00:00 left")


def test_a_resumed_stage_estimates_from_what_it_did_itself(capsys):
    now = 0.0
    lines = Lines("train", 1000, "step", 900, clock=lambda: now)
    now = 50.0
    lines.update(950, {})
    assert capsys.readouterr().err == "train: step 950 of 1,000, 00:50 left\n"


def test_a_note_is_a_line_of_its_own_everywhere(capsys):
    for mode in (ProgressMode.bar, ProgressMode.lines):
        with shown_progress(mode, "train", 10, "step") as shown:
            shown.note("step 5: validation 3.9", {})
        assert "step 5: validation 3.9\n" in capsys.readouterr().err


def test_a_program_reads_objects(capsys):
    with shown_progress(ProgressMode.json, "train", 10, "step") as shown:
        shown.update(3, VALUES)
        shown.note("step 3: validation", {"step": 3, "validation_loss": 4.0})
    state, note = map(json.loads, capsys.readouterr().out.splitlines())
    assert state == {"stage": "train", "total": 10, "unit": "step", "done": 3, **VALUES}
    assert note["validation_loss"] == 4.0


def test_quiet_means_nothing(capsys):
    with shown_progress(ProgressMode.none, "train", 10, "step") as shown:
        shown.update(10, VALUES)
        shown.note("a line", {})
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(("is_terminal", "kind"), [(True, progress.Bar), (False, Lines)])
def test_a_terminal_gets_a_bar_and_a_file_gets_lines(monkeypatch, is_terminal, kind):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    with shown_progress(ProgressMode.auto, "train", 10, "step") as shown:
        assert isinstance(shown, kind)


def test_the_bars_line_fits_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(progress, "BAR_DELAY_S", 0.0)
    with shown_progress(ProgressMode.bar, "train", 1030, "step", done=237) as shown:
        shown.update(238, {"loss": 3.91234, "val": 4.0211, "lr": 7.6e-3, "tok/s": 6842.0})
    last = capsys.readouterr().err.split("\r")[-1].rstrip()
    assert last.endswith("loss 3.912, val 4.021, lr 0.0076, tok/s 6,842")
    assert len(last) < 80


def test_what_is_done_at_once_has_no_bar(capsys):
    with shown_progress(ProgressMode.bar, "tokenize", 2, "character") as shown:
        shown.update(1, {})
        shown.update(2, {})
    assert capsys.readouterr().err == ""


def test_units_are_added_up(capsys):
    with shown_progress(ProgressMode.json, "evaluate", 10, "token") as shown:
        add = counted(shown)
        add(3)
        add(7)
    assert [json.loads(line)["done"] for line in capsys.readouterr().out.splitlines()] == [3, 10]

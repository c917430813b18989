import errno
import os
import sys

import pytest

from dsv3.cli import DryRunOption, command
from dsv3.errors import Interrupted, UserError


def status(main, monkeypatch, *arguments):
    """The exit status of `main` run as a command line."""
    monkeypatch.setattr(sys, "argv", ["stage", *arguments])
    with pytest.raises(SystemExit) as caught:
        command(main)
    return caught.value.code


def test_a_users_mistake_is_one_line_on_stderr_and_status_2(monkeypatch, capsys):
    def main() -> None:
        raise UserError("params.yaml: seed is -1;\n   must be >= 0")

    assert status(main, monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.err == "params.yaml: seed is -1; must be >= 0\n"
    assert captured.out == ""


def test_what_the_system_refuses_about_a_file_is_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    def main() -> None:
        tmp_path.read_text()

    assert status(main, monkeypatch) == 2
    assert capsys.readouterr().err == f"{tmp_path}: Is a directory\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_full_disk_is_one_line_even_where_no_file_is_named(monkeypatch, capsys, number):
    def main() -> None:
        raise OSError(number, os.strerror(number))

    assert status(main, monkeypatch) == 2
    assert capsys.readouterr().err.rstrip("\n").endswith(f": {os.strerror(number)}")


def test_missing_memory_is_one_line(monkeypatch, capsys):
    def main() -> None:
        raise MemoryError

    assert status(main, monkeypatch) == 2
    assert capsys.readouterr().err.startswith("out of memory; ")


def test_the_end_of_a_file_keeps_its_traceback_instead_of_aborted(monkeypatch):
    def main() -> None:
        raise EOFError("Ran out of input")

    monkeypatch.setattr(sys, "argv", ["stage"])
    with pytest.raises(RuntimeError, match="unexpected end of a file: Ran out of input"):
        command(main)


def test_an_interrupted_training_ends_with_the_signals_status(monkeypatch, capsys):
    def main() -> None:
        raise Interrupted("saved at step 3", 143)

    assert status(main, monkeypatch) == 143
    assert capsys.readouterr().err == "saved at step 3\n"


def test_the_programs_own_mistake_keeps_its_traceback(monkeypatch):
    def main() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["stage"])
    with pytest.raises(ZeroDivisionError):
        command(main)


def test_options_come_from_the_signature(monkeypatch):
    seen = []

    def main(output: str, dry_run: DryRunOption = False) -> None:
        seen.append((output, dry_run))

    assert status(main, monkeypatch, "somewhere", "--dry-run") == 0
    assert seen == [("somewhere", True)]


def test_an_unknown_option_is_a_users_mistake(monkeypatch):
    def main() -> None:
        pass

    assert status(main, monkeypatch, "--no-such-option") == 2

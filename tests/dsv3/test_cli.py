import errno
import os
import sys

import pytest
import torch

from dsv3.cli import DryRunOption, command, command_of, with_defaults
from dsv3.errors import Interrupted, UserError
from tests.training_inputs import ROOT


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


@pytest.mark.parametrize("error", ["cpu", "cuda"])
def test_what_torch_cannot_allocate_is_one_line_with_a_remedy(monkeypatch, capsys, error):
    def main() -> None:
        if error == "cpu":
            torch.empty(1 << 60, dtype=torch.uint8)
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 79 GiB.\nIf"
        )

    assert status(main, monkeypatch) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("out of memory (") and "smaller batches" in line
    assert ("Tried to allocate 2.00 GiB" if error == "cuda" else "allocate 1152921504606846976 bytes") in line


def test_another_runtime_error_keeps_its_traceback(monkeypatch):
    def main() -> None:
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError, match="a fault of the program"):
        status(main, monkeypatch)


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


def test_a_stage_takes_from_dvc_yaml_what_is_not_given():
    defaults = command_of("stages.train", ROOT / "dvc.yaml")
    assert defaults[:2] == ["--tokens", "data/tokens"]
    given = with_defaults(["--tokens=elsewhere", "--model", "mine", "--dry-run"], defaults)
    assert given[:4] == ["--tokens=elsewhere", "--model", "mine", "--dry-run"]
    assert given[4::2] == ["--corpus", "--sizes", "--results"]
    assert given[5::2] == ["data/corpus", "results/estimate_size/accepted.txt", "results/train"]


@pytest.mark.parametrize(
    "text", [None, "", "stages: [", "stages: 3", "stages: {train: {}}", "stages: {train: {cmd: 'a \"'}}"]
)
def test_without_a_pipeline_that_can_be_read_every_option_has_to_be_given(tmp_path, text):
    if text is not None:
        (tmp_path / "dvc.yaml").write_text(text)
    assert command_of("stages.train", tmp_path / "dvc.yaml") == []


@pytest.mark.parametrize("name", ["download", "tokenize", "estimate_size", "train", "evaluate", "sample"])
def test_every_stage_runs_without_its_paths(name):
    """In a folder with dvc.yaml; elsewhere it says what is missing."""
    assert "stage(main)" in (ROOT / "stages" / f"{name}.py").read_text()
    assert len(command_of(f"stages.{name}", ROOT / "dvc.yaml")) >= 2

import errno
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from dsv3.artifacts import temporary_name
from dsv3.cli import DryRunOption, command, missing_options, skip_shutdown
from dsv3.errors import LOST_PROCESS_STATUS, Interrupted, UserError
from tests.committed import PROJECT
from tests.dvc_yaml import STAGES, arguments_of, deps_of, outputs_of
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


def test_a_name_in_what_the_system_says_cannot_steer_a_terminal(monkeypatch, capsys, tmp_path):
    def main() -> None:
        (tmp_path / "a\x1b[2J\nb").read_text()

    assert status(main, monkeypatch) == 2
    assert capsys.readouterr().err == f"{tmp_path}/a [2J b: No such file or directory\n"


FULL = {
    "system": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_is_one_line_with_place_and_room_even_where_no_file_is_named(monkeypatch, capsys, error):
    def main() -> None:
        raise error

    assert status(main, monkeypatch) == 2
    assert re.fullmatch(
        rf"{Path.cwd()}: the disk is full \([\d,]+ bytes free\); make room and run the same again\n",
        capsys.readouterr().err,
    )


def test_a_full_disk_is_that_of_the_file_that_is_named(monkeypatch, capsys, tmp_path):
    def main() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "below" / "file"))

    assert status(main, monkeypatch) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path}/below/file: the disk is full (")


NO_MEMORY = {
    "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "safetensors": SafetensorError("Error while deserializing: Cannot allocate memory (os error 12)"),
    "Python": MemoryError("Unable to allocate 4.00 GiB for an array"),
}


@pytest.mark.parametrize("error", NO_MEMORY.values(), ids=NO_MEMORY)
def test_memory_that_cannot_be_had_is_one_line_whoever_asked_for_it(monkeypatch, capsys, error):
    def main() -> None:
        raise error

    assert status(main, monkeypatch) == 2
    line = capsys.readouterr().err
    assert line.startswith("out of memory (") and "smaller batches" in line and line.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO])
def test_what_the_machine_refuses_is_one_line_even_where_no_file_is_named(monkeypatch, capsys, number):
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


@pytest.mark.parametrize("is_typed", [True, False])
def test_another_processs_end_is_one_line_and_a_status_of_its_own(monkeypatch, capsys, is_typed):
    def main() -> None:
        if is_typed:
            raise torch.distributed.DistBackendError("NCCL error: remote process exited")
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    assert status(main, monkeypatch) == LOST_PROCESS_STATUS
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("another process of this training has ended")


def test_an_operation_that_torch_has_no_deterministic_algorithm_for_is_one_line(monkeypatch, capsys):
    def main() -> None:
        torch.use_deterministic_algorithms(True)
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))

    assert status(main, monkeypatch) == 2
    line = capsys.readouterr().err
    assert line.startswith("params.yaml: runtime.full_determinism is true; torch has no deterministic put_ on")
    assert line.count("\n") == 1


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


def test_ctrl_c_while_python_shuts_down_prints_nothing():
    """Exit handlers of libraries run then; torch's takes long enough to be met."""
    program = (
        "import atexit, os, signal; from dsv3.cli import command; "
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT)); command(lambda: print('done'))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("done\n", "")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError("DataLoader worker (pid 41) is killed by signal: Killed. "),
            "DataLoader worker (pid 41) is killed by signal: Killed: make memory free, or set runtime.",
        ),
        (BrokenProcessPool("A process in the process pool was terminated abruptly"), "a process that encodes was kill"),
    ],
)
def test_a_worker_process_that_was_killed_is_one_line_with_a_remedy(monkeypatch, capsys, error, told):
    def main() -> None:
        raise error

    assert status(main, monkeypatch) == 2
    line = capsys.readouterr().err
    assert line.startswith(told)
    assert line.count("\n") == 1


def test_a_tracker_that_failed_in_another_test_does_not_end_the_process_of_the_tests(monkeypatch):
    def main() -> None:
        skip_shutdown()

    assert status(main, monkeypatch) == 0


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


def example(tokens: str, final_model: str, params: str = "params.yaml", dry_run: DryRunOption = False) -> None:
    """A stage with two required options."""


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ([], ["--tokens", "data/tokens", "--final-model", "outputs/model"]),
        (["--tokens", "own", "--dry-run"], ["--final-model", "outputs/model"]),
        (["--final-model=own"], ["--tokens", "data/tokens"]),
        (["--tokens", "own", "--final-model", "own"], []),  # the optional --params stays what the signature says
    ],
)
def test_required_options_that_are_not_given_are_dvc_yamls(tmp_path, given, added):
    """Whatever else stands in its command: a flag, an optional option, quotes."""
    command_line = (
        "python -m stages.example --quiet --tokens data/tokens --params 'other params.yaml' --final-model outputs/model"
    )
    (tmp_path / "dvc.yaml").write_text(
        f"stages:\n  a:\n    cmd: python -m stages.a --tokens no\n  b:\n    cmd: {command_line}\n"
    )
    assert missing_options(example, given, "stages.example", tmp_path / "dvc.yaml") == added


@pytest.mark.parametrize("text", [None, "", "stages: [", "stages: 3", "stages: {a: {}}", "stages: {a: {cmd: 'a \"'}}"])
def test_without_a_pipeline_that_can_be_read_every_option_has_to_be_given(tmp_path, text):
    if text is not None:
        (tmp_path / "dvc.yaml").write_text(text)
    assert missing_options(example, [], "stages.example", tmp_path / "dvc.yaml") == []


def test_a_pipe_in_the_place_of_the_pipeline_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "dvc.yaml")
    assert missing_options(example, [], "stages.example", tmp_path / "dvc.yaml") == []


def test_a_pipeline_is_not_read_where_all_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3.cli.command_of", None)
    assert missing_options(example, ["--tokens=a", "--final-model", "b"], "stages.example", tmp_path) == []


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_runs_without_its_paths(tmp_path, name):
    """In a folder with dvc.yaml: it gets to its first input, or says where it would write, by dvc.yaml's name."""
    folder = shutil.copytree(PROJECT, tmp_path / "project")
    shutil.copy(ROOT / "dvc.yaml", folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command_line = [sys.executable, "-m", f"stages.{name}", "--dry-run"]
    done = subprocess.run(command_line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    paths = [word for word in arguments_of(STAGES[name]) if not word.startswith("--")]
    inputs = [path for path in deps_of(STAGES[name]) if not path.endswith(".py")]
    first = [path for path in paths if path in inputs][:1]  # where options name inputs, it must be the first of them
    assert any(path in done.stdout + done.stderr for path in first or (*paths, *inputs)), done
    (folder / "dvc.yaml").unlink()
    done = subprocess.run(command_line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert "Missing option" in done.stderr


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=str)
def test_a_stage_begins_by_removing_what_killed_ones_have_left_of_its_outputs_and_says_so(tmp_path, name, options):
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    outputs = [tmp_path / path for path in sorted(outputs_of(STAGES[name]))]
    left = [temporary_name(path, ended.pid) for path in outputs]
    kept = [temporary_name(path, os.getpid()) for path in outputs]
    for path in (*left, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command_line = [sys.executable, "-m", f"stages.{name}", "--params", "none.yaml", *options]
    done = subprocess.run(command_line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "none.yaml" in done.stderr
    assert all(path.exists() for path in kept)
    if options:
        assert all(path.exists() for path in left) and not done.stdout
    else:
        (line,) = done.stdout.splitlines()
        assert all(str(path.relative_to(tmp_path)) in line for path in left) and "bytes)" in line
        assert not any(path.exists() for path in left)

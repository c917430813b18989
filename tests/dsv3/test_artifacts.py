import errno
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dsv3 import artifacts
from dsv3.artifacts import (
    Contents,
    allocated_bytes,
    check_not_mixed,
    check_replaceable,
    check_replaceable_file,
    read_json,
    replacing,
    replacing_directory,
    sha256_bytes,
    sha256_file,
    sha256_lines,
    write_json,
    write_text,
)
from dsv3.errors import DiskFull, UserError
from tests.training_inputs import ROOT


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_under_its_name_and_nothing_else_is_left(tmp_path):
    with replacing(tmp_path / "new" / "file") as temporary:
        temporary.write_bytes(b"whole")
        assert names(tmp_path / "new") == [temporary.name]
    assert (tmp_path / "new" / "file").read_bytes() == b"whole"
    assert names(tmp_path / "new") == ["file"]


def test_a_failure_half_way_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["file"]


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "stale").write_text("old", encoding="utf-8")
    with replacing_directory(path) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "fresh").write_text("new", encoding="utf-8")
        assert names(path) == ["stale"]
    assert names(path) == ["deep"]
    assert names(tmp_path) == ["folder"]


@pytest.fixture
def group_reads():
    """A umask under which a new file has the permissions 640."""
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("group_reads")
def test_what_is_written_has_the_permissions_that_the_umask_gives(tmp_path):
    source = tmp_path / "source"
    source.mkdir(mode=0o700)
    (source / "copied").touch(mode=0o400)
    with replacing_directory(tmp_path / "folder") as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        save_file({"a": np.zeros(2)}, temporary / "weights.safetensors")
        (temporary / "deep").mkdir(mode=0o700)
        (temporary / "deep" / "private").touch(mode=0o600)
    write_text(tmp_path / "folder" / "text", "text")
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "folder", *tmp_path.glob("folder/**/*"))}
    assert found.pop("folder") == found.pop("deep") == 0o750
    assert found == dict.fromkeys(["copied", "weights.safetensors", "private", "text"], 0o640)


def test_a_failure_half_way_keeps_the_old_directory(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "stale").touch()
    with pytest.raises(RuntimeError), replacing_directory(path) as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    assert names(path) == ["stale"]
    assert names(tmp_path) == ["folder"]


def test_text_is_utf_8_with_unix_line_ends(tmp_path):
    write_text(tmp_path / "text", "é\nb\n")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\nb\n"


def test_json_comes_back_as_it_was_and_ends_with_a_newline(tmp_path):
    value = {"name": "é", "list": [1, 2.5, None, True]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert (tmp_path / "value.json").read_text(encoding="utf-8").endswith("}\n")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_refuses_numbers_that_json_does_not_have_and_writes_nothing(tmp_path, number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", {"loss": number})
    assert names(tmp_path) == []


def test_a_byte_order_mark_is_no_part_of_json(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"step": 1}')
    assert read_json(tmp_path / "config.json") == {"step": 1}


def test_json_that_is_damaged_is_one_line_with_the_remedy(tmp_path):
    for content in (b'{"step": 1', b"", b"\xff"):
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(UserError, match=r"run\.json: not JSON \(.*\); dvc checkout brings an output back"):
            read_json(tmp_path / "run.json")
    for content in ("[]", "3", "null", '"text"'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(UserError, match=r"run\.json: is .*; must be a JSON object; dvc checkout brings an output"):
            read_json(tmp_path / "run.json")


def test_digests_are_sha_256(tmp_path):
    data = b"x" * (1 << 20) + b"tail"
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_the_digest_of_several_files_knows_names_and_contents_but_not_the_order():
    first = sha256_lines({"x": "1", "y": "2"})
    assert first == sha256_lines({"y": "2", "x": "1"})
    assert first != sha256_lines({"x": "1", "y": "3"})
    assert first != sha256_lines({"x": "1", "z": "2"})


def test_json_is_readable_by_people(tmp_path):
    write_json(tmp_path / "value.json", {"a": 1})
    assert (tmp_path / "value.json").read_text(encoding="utf-8") == json.dumps({"a": 1}, indent=2) + "\n"


NAMES = ("text.txt", "*.json")
CONTENTS = Contents("manifest.json", NAMES)


def test_what_an_earlier_run_wrote_is_replaced(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "manifest.json").touch()
    with replacing_directory(tmp_path / "corpus", CONTENTS) as folder:
        (folder / "text.txt").touch()
    assert names(tmp_path / "corpus") == ["text.txt"]


def test_a_folder_with_anything_else_in_it_is_refused_and_kept(tmp_path):
    for name in ("manifest.json", "thesis.txt", "notes"):
        (tmp_path / name).touch()
    with (
        pytest.raises(UserError, match=r"holds notes and 1 more, which is not written here and would be lost"),
        replacing_directory(tmp_path, CONTENTS),
    ):
        pass
    assert names(tmp_path) == ["manifest.json", "notes", "thesis.txt"]


def test_a_folder_of_somebodys_own_that_has_a_name_of_ours_is_refused_and_kept(tmp_path):
    (tmp_path / "text.txt").write_text("precious")
    told = f"{tmp_path}: holds text.txt and no manifest.json, so it was not written here and would be lost"
    with pytest.raises(UserError, match=re.escape(told)), replacing_directory(tmp_path, CONTENTS):
        pass
    assert (tmp_path / "text.txt").read_text() == "precious"


def test_an_empty_folder_may_be_filled(tmp_path):
    with replacing_directory(tmp_path / "new", CONTENTS) as folder:
        (folder / "manifest.json").touch()
    (tmp_path / "empty").mkdir()
    with replacing_directory(tmp_path / "empty", CONTENTS) as folder:
        (folder / "manifest.json").touch()
    assert names(tmp_path / "empty") == names(tmp_path / "new") == ["manifest.json"]


@pytest.mark.parametrize("name", [".", "..", "here"])
def test_a_folder_that_holds_the_working_directory_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    path = tmp_path / name if name == "here" else Path(name)
    with pytest.raises(UserError, match="holds the working directory"):
        check_replaceable(path, CONTENTS)


def test_a_file_or_a_link_is_no_folder_to_be_replaced(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("file", "link"):
        with pytest.raises(UserError, match="is no folder"):
            check_replaceable(tmp_path / name, CONTENTS)


def test_a_free_name_may_be_taken(tmp_path):
    check_replaceable(tmp_path / "new", CONTENTS)
    check_not_mixed(tmp_path / "new", NAMES)
    check_replaceable_file(tmp_path / "new", PAGE, "page")


def test_files_are_not_written_over_their_like_beside_others(tmp_path):
    for name in ("notes.md", ".gitignore"):
        (tmp_path / name).touch()
    check_not_mixed(tmp_path, NAMES)  # none would be replaced
    (tmp_path / "metrics.json").touch()
    with pytest.raises(UserError, match=r"holds metrics\.json, which would be replaced, beside notes\.md"):
        check_not_mixed(tmp_path, NAMES)
    (tmp_path / "notes.md").unlink()
    check_not_mixed(tmp_path, NAMES)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "file.json"
    if kind == "pipe":
        os.mkfifo(path)
    path = {"pipe": path, "device": Path("/dev/zero"), "folder": tmp_path}[kind]
    for read in (sha256_file, read_json):
        with pytest.raises(OSError, match="it is no regular file"):
            read(path)


PAGE = re.compile(rb"# Page\n")


def test_a_file_is_replaced_by_its_like_alone(tmp_path):
    (tmp_path / "page.md").write_text("# Page\n\nof an earlier run\n")
    check_replaceable_file(tmp_path / "page.md", PAGE, "page")
    (tmp_path / "thesis.md").write_text("# Thesis\n")
    os.mkfifo(tmp_path / "pipe")
    for name in ("thesis.md", "pipe"):
        with pytest.raises(UserError, match=f"{name}: is no page and would be lost; name another file"):
            check_replaceable_file(tmp_path / name, PAGE, "page")
    with pytest.raises(UserError, match="is a folder; name the file to be written"):
        check_replaceable_file(tmp_path, PAGE, "page")


FULL = {
    "system": OSError(errno.ENOSPC, "No space left on device"),
    "safetensors' quota": SafetensorError("I/O error: Disk quota exceeded (os error 122)"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
@pytest.mark.parametrize("replace", [replacing, replacing_directory])
def test_a_full_disk_is_told_with_its_folder_and_leaves_what_was_there(tmp_path, replace, error):
    with (
        pytest.raises(DiskFull, match=rf"{tmp_path}: the disk is full: new needs more than the [\d,]+ bytes that are"),
        replace(tmp_path / "new"),
    ):
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("replace", [replacing, replacing_directory])
def test_room_includes_what_is_half_written_and_is_removed(tmp_path, monkeypatch, replace):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    with pytest.raises(DiskFull, match="new needs more than the 12,288 bytes"), replace(tmp_path / "new") as temporary:
        file = temporary / "part" if replace is replacing_directory else temporary
        file.write_bytes(b"x" * 4096)
        monkeypatch.setattr(artifacts, "allocated_bytes", lambda path: 8192 if path == temporary else 0)
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_cannot_be_made_on_a_full_disk_is_told_so_too(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    for replace in (replacing, replacing_directory):
        with pytest.raises(DiskFull, match="below: the disk is full"), replace(tmp_path / "below" / "new"):
            pass


def test_what_is_written_in_a_folder_is_named_and_not_the_folder(tmp_path):
    with (
        pytest.raises(DiskFull, match="inner needs more"),
        replacing_directory(tmp_path / "outer") as folder,
        replacing(folder / "inner"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


WRITERS = {
    "system": lambda path: path.write_bytes(bytes(1 << 18)),
    "safetensors": lambda path: save_file({"weight": np.zeros(1 << 16)}, path),
    "torch": lambda path: torch.save({"weight": torch.zeros(1 << 16)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("replace", [replacing, replacing_directory])
def test_a_file_that_may_not_be_so_large_is_told_and_leaves_nothing(tmp_path, writer, replace):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        match = rf"{tmp_path}: new can't be written .*; raise ulimit -f"
        with pytest.raises(DiskFull, match=match), replace(tmp_path / "new") as path:
            WRITERS[writer](path / "file" if replace is replacing_directory else path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES])
def test_what_the_system_refuses_a_library_is_told_as_the_systems_error(tmp_path, number):
    text = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    with pytest.raises(OSError) as error, replacing(tmp_path / "new"):
        raise SafetensorError(text)
    assert (error.value.errno, error.value.filename) == (number, str(tmp_path / "new"))


def test_allocated_bytes_are_those_of_all_files_below(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x" * 10_000)
    assert allocated_bytes(tmp_path / "nothing") == 0
    assert allocated_bytes(tmp_path / "a") >= 10_000


@pytest.mark.parametrize("text", ["PytorchStreamWriter failed writing file data/0", "unexpected pos 39744 vs 39632"])
def test_torchs_writer_fails_for_a_full_disk_or_for_too_large_a_file(tmp_path, monkeypatch, text):
    error = RuntimeError(f"[enforce fail at inline_container.cc:672] . {text}")
    with (
        pytest.raises(DiskFull, match=rf"{tmp_path}: new can't be written .*{text}.*; raise"),
        replacing(tmp_path / "new"),
    ):
        raise error
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="the disk is full"), replacing(tmp_path / "new"):
        raise error


@pytest.mark.parametrize("replace", [replacing, replacing_directory])
def test_the_new_name_is_flushed_too(tmp_path, monkeypatch, replace):
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (flushed.append(str(Path(f"/proc/self/fd/{handle}").readlink())), fsync(handle))
    )
    with replace(tmp_path / "made" / "too" / "new") as temporary:
        if replace is replacing_directory:
            (temporary / "part").mkdir()
        (temporary / "part" / "file" if replace is replacing_directory else temporary).touch()
    assert flushed[-1] == str(tmp_path / "made" / "too")
    assert {str(tmp_path), str(tmp_path / "made")} <= set(flushed)  # names of folders that were made on the way
    within = {str(temporary), str(temporary / "part"), str(temporary / "part" / "file")}
    assert (within <= set(flushed)) == (replace is replacing_directory)


KILLED = """
import os, signal, sys
from pathlib import Path
from dsv3.artifacts import replacing, replacing_directory
writer = {"file": replacing, "folder": replacing_directory}[sys.argv[1]]
with writer(Path(sys.argv[2])) as temporary:
    (temporary / "part" if sys.argv[1] == "folder" else temporary).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_half_written_is_removed_by_the_next_one_and_nothing_else(tmp_path, kind):
    path = tmp_path / "model[1].bin"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED, kind, str(path)], cwd=ROOT, check=False)
        assert done.returncode == -9
    (left,) = tmp_path.iterdir()  # the second has removed the first one's
    others = [
        left.with_name(name) for name in (f".model[1].bin.elsewhere.{2**22 + 1}.tmp", ".model.bin.x.1.tmp", "own.tmp")
    ]
    living = left.with_name(left.name.replace(left.name.split(".")[-2], str(os.getppid())))
    for other in (*others, living):
        other.write_text("somebody's")
    writer = replacing if kind == "file" else replacing_directory
    with writer(path) as temporary:
        (temporary / "part" if kind == "folder" else temporary).write_text("whole")
    assert set(tmp_path.iterdir()) == {path, living, *others}

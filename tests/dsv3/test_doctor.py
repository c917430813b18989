import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer

from dsv3 import devices, doctor
from dsv3.artifacts import read_json, write_json
from dsv3.doctor import (
    CHECKS,
    Finding,
    check_aim,
    check_disk,
    check_driver,
    check_experts,
    check_home,
    check_memory,
    check_outputs,
    check_params,
    check_path,
    check_python,
    check_repository,
    check_schema,
    check_torch,
    check_trackers,
    disk_bytes,
    finding,
    is_locked,
)
from dsv3.kernels import convert, registry
from dsv3.params.architecture import read_architecture
from dsv3.params.read import read_params, schema_text
from dsv3.sizing.parameters import num_parameters
from dsv3.training import precision, setup
from tests.committed import PROJECT

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project as it is cloned: parameters, models, schema, a Git and a DVC repository."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "mini_model").symlink_to(PROJECT / "mini_model")
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".gitignore").write_text("*\n", encoding="utf-8")
    (tmp_path / "dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    commit = [
        "git",
        "-c",
        "user.name=lab",
        "-c",
        "user.email=lab@example.org",
        "commit",
        "--allow-empty",
        "-qm",
        "start",
    ]
    subprocess.run(commit, cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


def edit(old, new):
    text = Path("params.yaml").read_text(encoding="utf-8")
    assert old in text
    Path("params.yaml").write_text(text.replace(old, new), encoding="utf-8")


def test_a_finding_is_one_line_and_a_bad_one_names_its_remedy():
    assert str(Finding("disk", True, "9 GiB free", "free some")) == "ok  disk        9 GiB free"
    assert str(Finding("disk", False, "0 GiB free", "free some")) == "!!  disk        0 GiB free; free some"


@pytest.mark.parametrize(
    "check",
    [
        *(check_python, check_repository, check_outputs, check_params, check_torch),
        *(check_experts, check_memory, check_disk),
    ],
)
def test_a_sound_project_on_this_machine_passes(check):
    found = check()
    assert found.is_ok, found


def test_the_wrong_python_is_found(monkeypatch):
    for version, mark in {(3, 10, 9): "!!", (3, 11, 0): "ok", (3, 14, 2): "ok", (3, 15, 0): "!!"}.items():
        monkeypatch.setattr(sys, "version_info", version)
        assert str(check_python()).startswith(f"{mark}  python      {'.'.join(map(str, version))} in ")


def test_a_dvc_of_another_environment_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(Path(sys.executable).parent / name))
    assert check_path().is_ok
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/dvc")
    assert "dvc is /usr/bin/dvc; run: source " in str(check_path())
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "dvc is not found; run: source " in str(check_path())


def test_changes_are_counted_and_a_missing_repository_is_found(monkeypatch, tmp_path_factory):
    assert check_repository().message == "nothing differs from the last commit"
    Path(".gitignore").unlink()
    assert check_repository().message.endswith("files differ from the last commit")
    shutil.rmtree(".dvc")
    assert "no .dvc here; go to the project's root" in str(check_repository())
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    remedy = "not a Git repository; run: git init && dvc init && git add -A && git commit -m start"
    assert remedy in str(check_repository())
    Path(".dvc").mkdir()  # a downloaded archive of the project, in which `dvc init` fails
    assert remedy.replace("dvc init && ", "") in str(check_repository())
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert "has no commit, with which experiments are compared; run: git add -A" in str(check_repository())


def test_a_checkout_of_another_user_is_told_how_it_is_trusted(monkeypatch, project):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    assert str(check_repository()).endswith(
        f"belongs to another user, so Git and DVC refuse it; run: git config --global --add safe.directory {project}"
    )
    settings = project / "gitconfig"
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    subprocess.run(["git", "config", "--global", "--add", "safe.directory", str(project)], check=True)
    assert check_repository().is_ok


def test_outputs_that_are_linked_to_another_disk_are_found(tmp_path_factory):
    Path("outputs").symlink_to(tmp_path_factory.mktemp("disk"))
    found = finding(check_outputs)
    assert not found.is_ok
    assert "outputs leads out of the project, where DVC takes no outputs; remove it, and run: dvc cache dir" in str(
        found
    )


def test_a_home_that_cannot_be_written_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(doctor, "has_nvidia_driver", lambda: False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert check_home().is_ok
    (tmp_path / "home").touch()  # root may write everywhere but in a file
    assert str(check_home()).endswith(
        "huggingface can't be written, where libraries keep what they load; run: export HF_HOME=/tmp/hf_home"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert check_home().is_ok


def test_a_mistake_in_params_yaml_is_found_by_every_check_that_reads_it():
    edit("top_p: 0.95", "top_p: 2")
    assert str(finding(check_params)) == (
        "!!  params      params.yaml: sample.top_p is 2; must be <= 1; correct params.yaml"
    )
    assert not finding(check_disk).is_ok


def test_a_schema_that_is_out_of_date_is_found_and_written_anew(project):
    (project / "docs").unlink()
    assert "out of date; run: python -m dsv3.doctor --write-schema" in str(check_schema())
    doctor.main(write_schema=True)
    assert Path("docs/params.schema.json").read_text(encoding="utf-8") == schema_text()
    assert check_schema().is_ok


def test_a_driver_that_torch_does_not_use_is_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert check_driver().is_ok
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "does not use it" in str(check_driver())


def test_a_cuda_device_that_is_asked_for_and_missing_is_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    edit("device: auto", "device: cuda")
    assert "runtime.device is cuda; this machine has no CUDA device; set it to auto or cpu" in str(finding(check_torch))


def test_an_expert_backend_that_cannot_run_here_is_found():
    edit("experts: auto", "experts: triton_fp8")
    assert "train.experts is triton_fp8; runs on cuda, not on cpu, take auto" in str(finding(check_experts))


@pytest.mark.parametrize(
    ("use_fp8", "mx_blocks", "widths", "reported"),
    [
        (False, False, (256, 128), "dsv3_grouped_mm_bf16; for bf16 on cuda there are reference, grouped_mm, bf16_em"),
        (False, False, (100, 36), "dsv3_reference_bf16; for bf16 on cuda there are reference, bf16_emulated"),
        (True, False, (256, 128), "dsv3_triton_fp8_bf16; for bf16 with fp8 on cuda there are triton_fp8, fp8_emulated"),
        (True, False, (100, 36), "dsv3_fp8_emulated; for bf16 with fp8 on cuda there are fp8_emulated"),
        (True, True, (256, 128), "dsv3_fp8_emulated_mx_blocks; for bf16 with fp8 on cuda there are fp8_emulated"),
    ],
)
def test_the_reported_expert_backend_is_the_one_that_a_training_takes_on_a_gpu(
    monkeypatch, project, use_fp8, mx_blocks, widths, reported
):
    sizes = read_json(PROJECT / "mini_model" / "config_nano.json")
    sizes |= dict(zip(("hidden_size", "moe_intermediate_size"), widths, strict=True))
    write_json(project / "model.json", sizes)
    edit("config: mini_model/config_nano.json", "config: model.json")
    edit("use_fp8: false", f"use_fp8: {str(use_fp8).lower()}")
    edit("fp8_mx_blocks: false", f"fp8_mx_blocks: {str(mx_blocks).lower()}")
    gpu = torch.device("cuda")
    monkeypatch.setattr(devices, "torch_device", lambda runtime: gpu)
    for module in (registry, precision):
        monkeypatch.setattr(module, "multiplies_bf16", lambda device: True)
    monkeypatch.setattr(registry, "multiplies_fp8", lambda device: True)
    monkeypatch.setattr(convert, "multiplies_fp8", lambda device: False)
    monkeypatch.setattr(setup, "autocast_dtype", lambda asked, device: torch.bfloat16)
    monkeypatch.setattr(setup, "device_name", str)
    monkeypatch.setattr(setup, "choose_attention", lambda *_: "torch's")  # which can't be asked here
    params = read_params(Path("params.yaml"))
    architecture = read_architecture(Path(params.model.config))
    plan = SimpleNamespace(params=params, architecture=architecture, initial_weights=None, teachers=())
    _, chosen = setup.prepare_model(plan, gpu)
    assert check_experts().message.startswith(reported)
    assert chosen.experts == reported.partition(";")[0]


def test_a_training_that_does_not_fit_the_container_or_the_disk_is_found(monkeypatch):
    monkeypatch.setattr(devices, "_container_limit", lambda cgroup: (1 << 20, 0))
    assert "lower train.per_device_train_batch_size" in str(check_memory())
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    assert "free some, or lower runtime.save_total_limit" in str(check_disk())


def test_the_disk_holds_one_checkpoint_more_than_are_kept_and_the_export():
    """AdamW: weights and two moments, 12 bytes per parameter; the export: 4."""
    edit("optim: muon", "optim: adamw")
    params = read_params(Path("params.yaml"))
    checkpoints = params.runtime.save_total_limit + 1
    expected = (12 * checkpoints + 4) * num_parameters(read_architecture(Path(params.model.config)))
    assert disk_bytes(params) == pytest.approx(expected, rel=0.001)
    train = params.train.model_copy(update={"load_best_model_at_end": True})
    best = disk_bytes(params.model_copy(update={"train": train}))
    assert best - disk_bytes(params) == pytest.approx(expected * 8 / (12 * checkpoints + 4), rel=0.001)


def test_aim_tells_where_runs_go_and_whether_its_interface_is_up(monkeypatch):
    pytest.importorskip("aim", reason="Aim has no wheels for this Python")
    assert check_aim().is_ok
    assert "will be made by the first run" in check_aim().message
    lock = Path(".aim/meta/index/LOCK")
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert "its interface is up" not in check_aim().message
    monkeypatch.setattr(doctor, "is_locked", lambda path: path.name == "LOCK")
    assert check_aim().message.endswith(", its interface is up")
    edit("aim_repo: null", "aim_repo: aim://127.0.0.1:53800")
    assert "runs go to aim://127.0.0.1:53800 (not contacted)" in check_aim().message


def test_aim_is_missed_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert str(check_aim()).endswith("set runtime.trackers to [tensorboard], or use Python 3.12")
    edit("trackers: [aim]", "trackers: [tensorboard]")
    assert check_aim().is_ok


def test_a_tracker_that_is_named_and_not_installed_is_found(monkeypatch):
    assert check_trackers().is_ok
    edit("trackers: [aim]", "trackers: [tensorboard, wandb]")
    installed, folder = SimpleNamespace(origin="__init__.py"), SimpleNamespace(origin=None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: folder if name == "wandb" else installed)
    assert str(check_trackers()).endswith(
        "wandb is not installed, so it will show no run; pip install -c constraints.txt wandb, or take wandb from "
        "runtime.trackers in params.yaml"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed)
    assert check_trackers().message == "tensorboard, wandb can be imported"


def test_a_lock_is_seen_only_while_another_process_holds_it(tmp_path):
    lock = tmp_path / "LOCK"
    assert not is_locked(lock)
    lock.touch()
    assert not is_locked(lock)
    take = f"import fcntl; file = open({str(lock)!r}, 'r+'); fcntl.lockf(file, fcntl.LOCK_EX)"
    code = f"{take}; print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert is_locked(lock)
        holder.communicate(b"\n")
    assert not is_locked(lock)


def test_a_package_that_is_missing_is_a_finding():
    def check_something():
        raise ModuleNotFoundError("No module named 'torch'")

    assert "No module named 'torch'; install the dependencies: make setup" in str(finding(check_something))


def test_the_programs_own_mistake_is_no_finding():
    def check_something():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        finding(check_something)


def lines_of_the_command() -> list[str]:
    result = subprocess.run(
        [sys.executable, "-m", "dsv3.doctor"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = result.stdout.splitlines()
    assert result.returncode == any(line.startswith("!!") for line in lines)
    return lines


def test_the_command_prints_a_line_per_check():
    lines = lines_of_the_command()
    assert len(lines) == len(CHECKS)
    assert all(line.startswith(("ok  ", "!!  ")) for line in lines)


def test_a_mistake_is_reported_once_and_the_checks_that_it_prevents_are_named():
    edit("top_p: 0.95", "top_p: 2")
    lines = lines_of_the_command()
    assert sum("top_p is 2" in line for line in lines) == 1
    assert lines[-1] == "--  torch, experts, memory, disk, aim, trackers, views: not checked, for a reason above"
    assert len(lines) == len(CHECKS) - 7 + 1


def test_a_package_that_is_missing_is_reported_once(monkeypatch, capsys):
    def missing():
        raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setattr(doctor, "CHECKS", (missing, missing))
    with pytest.raises(typer.Exit):
        doctor.main()
    assert capsys.readouterr().out.count("No module named 'torch'") == 1

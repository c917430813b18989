import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from dsv3 import presets
from dsv3.errors import UserError
from dsv3.params.architecture import read_architecture
from dsv3.params.read import read_params, read_yaml, validated
from dsv3.presets import apply_preset, flags, merged, preset_names, purpose, read_preset
from dsv3.sizing.machines import MACHINES, fits
from tests.committed import PROJECT

ROOT = Path(__file__).parents[2]
MACHINE_OF = {
    "tiny": "CPU, 32 GB",
    "tiny_minimal": "CPU, 8 GB",
    "quality_cpu": "CPU, 8 GB",
    "rtx4090_24gb": "RTX 4090 24 GB",
    "a100_40gb": "A100 40 GB",
    "h100_80gb": "H100 80 GB",
    "mini_h100": "H100 80 GB",
}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A folder with a copy of params.yaml and the models' configurations behind a link."""
    (tmp_path / "mini_model").symlink_to(PROJECT / "mini_model")
    (tmp_path / "params.yaml").write_bytes((PROJECT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_preset(name):
    return validated(merged(read_yaml(PROJECT / "params.yaml"), read_preset(name)), Path(name))


def test_the_presets_are_the_ones_that_are_documented():
    assert preset_names() == sorted(MACHINE_OF)


@pytest.mark.parametrize("name", MACHINE_OF)
def test_a_preset_changes_params_yaml_into_another_valid_one(name):
    params = with_preset(name)
    for path, value in read_preset(name).items():
        section, key = path.split(".")
        assert getattr(getattr(params, section), key) == value


@pytest.mark.parametrize("name", MACHINE_OF)
def test_a_preset_fits_the_machine_that_it_is_named_after_by_our_own_estimate(name):
    params = with_preset(name)
    machine = next(machine for machine in MACHINES if machine.name == MACHINE_OF[name])
    assert fits(read_architecture(Path(params.model.config)), params.train, machine)


@pytest.mark.parametrize("name", MACHINE_OF)
def test_a_preset_states_the_length_of_its_training_whatever_the_default_is(name):
    assert "train.max_steps" in read_preset(name)


@pytest.mark.parametrize("name", MACHINE_OF)
def test_applying_a_preset_changes_its_lines_and_keeps_every_comment(name):
    before = Path("params.yaml").read_text(encoding="utf-8").splitlines()
    apply_preset(read_preset(name), Path("params.yaml"))
    after = Path("params.yaml").read_text(encoding="utf-8").splitlines()
    assert [line.partition("#")[2] for line in before] == [line.partition("#")[2] for line in after]
    changed = {new.split(":")[0].strip() for old, new in zip(before, after, strict=True) if old != new}
    assert changed <= {path.split(".")[1] for path in read_preset(name)}
    assert read_params(Path("params.yaml")) == with_preset(name)


def test_applying_a_preset_twice_is_applying_it_once():
    apply_preset(read_preset("tiny"), Path("params.yaml"))
    once = Path("params.yaml").read_bytes()
    apply_preset(read_preset("tiny"), Path("params.yaml"))
    assert Path("params.yaml").read_bytes() == once


def test_a_preset_that_contradicts_the_rest_writes_nothing():
    before = Path("params.yaml").read_bytes()
    with pytest.raises(UserError, match=r"^params.yaml: train.block_size is 99999; must be <= "):
        apply_preset({"train.block_size": 99999}, Path("params.yaml"))
    assert Path("params.yaml").read_bytes() == before


def test_a_preset_with_a_key_that_params_yaml_lacks_is_refused():
    with pytest.raises(UserError, match=r"train\.learnin_rate is no parameter"):
        apply_preset({"train.learnin_rate": 1.0}, Path("params.yaml"))


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"^huge is no preset; known: a100_40gb, "):
        read_preset("huge")


@pytest.mark.parametrize("content", [b"[]", b"{}", b"3", b"", b"train: 3", b"seed: 1", b"{", b"\xff", b"a: &a [*a]"])
def test_damaged_parameters_are_one_line(content):
    Path("params.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        apply_preset(read_preset("quality_cpu"), Path("params.yaml"))
    assert "params.yaml" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError) as error:
        presets.own_values(["train.max_steps=1"], Path("params.yaml"))
    assert "params.yaml" in str(error.value) and "\n" not in str(error.value)
    assert Path("params.yaml").read_bytes() == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((text, "is no preset; must hold sections") for text in (b"", b"[]", b"3", b"train: 3", b"train: {}")),
        *(
            (b"train: {max_steps: %s}" % text, "train.max_steps is .*; must be one value")
            for text in (b"[1]", b"{a: 1}")
        ),
        (b"{", "not YAML"),
        (b"\xff", "is not UTF-8"),
        (b"a.b: {c: 1}", "params.yaml has no section a, for a.b.c"),
        (b"train: {x.y: 1}", "train.x.y is no parameter"),
        (b"train: {3: 4}", "train.3 is no parameter"),
    ],
)
def test_a_file_that_is_no_preset_is_one_line_and_is_listed_with_the_others(monkeypatch, tmp_path, content, message):
    monkeypatch.setattr(presets, "FOLDER", tmp_path / "presets")
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "mine.yaml").write_bytes(content)
    assert preset_names() == ["mine"]
    assert "\n" not in purpose("mine")
    with pytest.raises(UserError, match=message) as error:
        apply_preset(read_preset("mine"), Path("params.yaml"))
    assert "\n" not in str(error.value)


def test_flags_are_what_dvc_exp_run_takes_and_read_back_as_the_same_values():
    """`-S` takes Hydra's grammar, whose scalars are YAML's."""
    overlay = {"train.use_fp8": True, "data.path": None, "train.learning_rate": 2.5e-4, "train.optim": "adamw"}
    arguments = flags(overlay)
    assert arguments[::2] == ["-S"] * 4
    pairs = [argument.split("=") for argument in arguments[1::2]]
    assert {name: YAML(typ="safe").load(value) for name, value in pairs} == overlay


def test_every_preset_says_what_it_is_for_in_a_line_and_holds_scalars_only():
    for name in preset_names():
        assert purpose(name)[0].isupper()
        assert len(purpose(name)) <= 100
        assert all(isinstance(value, str | int | float | None) for value in read_preset(name).values())


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "dsv3.presets", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_lists_prints_flags_and_applies():
    assert [line.split()[0] for line in command("list").stdout.splitlines()] == preset_names()
    assert shlex.split(command("flags", "tiny").stdout) == flags(read_preset("tiny"))
    assert command("apply", "tiny").returncode == 0
    assert read_params(Path("params.yaml")).model.config == "mini_model/config_tiny.json"


def test_a_value_of_ones_own_wins_over_the_presets():
    """DVC takes the last of two values for a parameter, so each stands once."""
    arguments = shlex.split(command("flags", "tiny", "-S", "train.max_steps=1", "-S", "seed=2").stdout)
    pairs = dict(argument.split("=", 1) for argument in arguments[1::2])
    assert len(pairs) == len(arguments) / 2
    assert (pairs["train.max_steps"], pairs["seed"]) == ("1", "2")
    assert set(pairs) == {*read_preset("tiny"), "seed"}


@pytest.mark.parametrize("pair", ["train.max_step=1", "train.max_steps", "seed.x=1", "train=1", "trian.max_steps=1"])
def test_an_own_value_that_names_no_parameter_is_one_line_and_prints_no_flags(pair):
    result = command("flags", "tiny", "-S", pair)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"{pair} names no parameter; must be section.key=value, as in params.yaml\n"


def test_a_users_mistake_is_one_line_and_status_2():
    result = command("apply", "huge")
    assert result.returncode == 2
    assert result.stderr.startswith("huge is no preset")
    assert result.stderr.count("\n") == 1


def test_presets_lie_where_the_code_looks_for_them():
    assert presets.FOLDER == ROOT / "presets"

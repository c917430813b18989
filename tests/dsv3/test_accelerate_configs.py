from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from dsv3.training.launch import check_environment
from tests.committed import DEFAULTS

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"
NAMES = ("ddp", "multi_node", "single_gpu")


def launched(name):
    """What `accelerate launch --config_file …` would start: its arguments after reading the file."""
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), "-m", "stages.train"]
    arguments, _, is_mixed_precision_stated = _validate_launch_command(launch_command_parser().parse_args(command))
    assert is_mixed_precision_stated
    return arguments


def test_the_configs_are_the_ones_that_are_documented():
    assert sorted(path.stem for path in FOLDER.glob("*")) == sorted(NAMES)


@pytest.mark.parametrize(
    ("name", "num_machines", "num_processes"),
    [("single_gpu", 1, 1), ("ddp", 1, 8), ("multi_node", 2, 16)],
)
def test_accelerate_reads_a_config_as_it_is_meant(name, num_machines, num_processes):
    arguments = launched(name)
    assert (arguments.num_machines, arguments.num_processes) == (num_machines, num_processes)
    assert arguments.mixed_precision == "bf16"
    assert not arguments.use_fsdp and not arguments.use_deepspeed
    assert not arguments.use_cpu


@pytest.mark.parametrize("name", NAMES)
def test_every_config_says_what_it_assumes_and_how_it_is_launched(name):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert "\n# Assumes: " in text
    assert f"accelerate launch --config_file configs/accelerate/{name}.yaml" in text


@pytest.mark.parametrize(
    ("name", "prepared"), [("single_gpu", prepare_simple_launcher_cmd_env), ("ddp", prepare_multi_gpu_env)]
)
def test_what_accelerate_launch_leaves_in_the_environment_of_its_processes_is_taken(name, prepared):
    arguments = launched(name)
    found = prepared(arguments)
    environment = found[1] if isinstance(found, tuple) else found
    settings = {key: value for key, value in environment.items() if key.startswith("ACCELERATE_")}
    assert "ACCELERATE_DYNAMO_BACKEND" in settings
    check_environment(DEFAULTS.runtime, settings)


def test_a_hidden_default_config_changes_nothing(tmp_path, monkeypatch):
    hidden = tmp_path / "accelerate" / "default_config.yaml"
    hidden.parent.mkdir()
    hidden.write_text(
        "distributed_type: FSDP\nmixed_precision: fp16\nnum_processes: 4\nuse_cpu: true\n", encoding="utf-8"
    )
    monkeypatch.setattr("accelerate.commands.config.config_args.default_yaml_config_file", str(hidden))
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", str(hidden))
    test_accelerate_reads_a_config_as_it_is_meant("ddp", 1, 8)

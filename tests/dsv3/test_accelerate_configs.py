from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from mini_model import modeling_deepseek

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"
NAMES = ("ddp", "deepspeed_zero3_offload", "fsdp2", "fsdp2_cpu_offload", "multi_node", "single_gpu")


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
    [("single_gpu", 1, 1), ("ddp", 1, 8), ("multi_node", 2, 16), ("fsdp2", 1, 8), ("fsdp2_cpu_offload", 1, 8)],
)
def test_accelerate_reads_a_config_as_it_is_meant(name, num_machines, num_processes):
    arguments = launched(name)
    assert (arguments.num_machines, arguments.num_processes) == (num_machines, num_processes)
    assert arguments.mixed_precision == "bf16"
    assert arguments.use_fsdp == name.startswith("fsdp2")
    assert not arguments.use_cpu


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_cpu_offload"])
def test_sharding_is_fsdp2_of_our_layers(name):
    environment = prepare_multi_gpu_env(launched(name))
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_OFFLOAD_PARAMS"] == str(name.endswith("offload")).lower()
    assert isinstance(getattr(modeling_deepseek, environment["FSDP_TRANSFORMER_CLS_TO_WRAP"]), type)


def test_deepspeed_is_zero_3_with_everything_in_host_memory():
    arguments = launched("deepspeed_zero3_offload")
    assert arguments.use_deepspeed
    assert int(arguments.zero_stage) == 3
    assert (arguments.offload_optimizer_device, arguments.offload_param_device) == ("cpu", "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_every_config_says_what_it_assumes_and_how_it_is_launched(name):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert "\n# Assumes: " in text
    assert f"accelerate launch --config_file configs/accelerate/{name}.yaml" in text

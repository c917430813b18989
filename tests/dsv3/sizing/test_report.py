from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.params.architecture import read_architecture
from dsv3.sizing.machines import MACHINES
from dsv3.sizing.memory import GIB, training_memory
from dsv3.sizing.parameters import PARTS
from dsv3.sizing.report import check_budget, markdown_lines, markdown_table, metrics, table_row
from tests.committed import DEFAULTS, PROJECT

PARAMS = DEFAULTS
TINY = read_architecture(PROJECT / "mini_model" / "config_tiny.json")
UNITS = (
    "_bytes",
    "_gib",
    "_flops_per_token",
    "_flops_per_step",
    "_flops_total",
    "_bytes_per_token",
    "_tokens_per_step",
)


def test_every_metric_is_a_plain_number_under_a_flat_name_that_says_what_it_counts():
    values = metrics(TINY, PARAMS.train, PARAMS.estimate_size)
    for name, value in values.items():
        assert type(value) in (int, float), name
        assert name.startswith(("parameters_", "buffers_", "forward_flops")) or name.endswith(UNITS), name


def test_the_parts_sum_to_the_total():
    values = metrics(TINY, PARAMS.train, PARAMS.estimate_size)
    assert sum(values[f"parameters_{part}"] for part in PARTS) == values["parameters_total"] == 142_435_584
    assert values["parameters_active"] == 103_507_200


def test_a_run_of_known_length_has_a_total_and_another_has_none():
    unknown = metrics(TINY, PARAMS.train, PARAMS.estimate_size)
    assert "training_flops_total" not in unknown
    known = metrics(TINY, PARAMS.train.model_copy(update={"max_steps": 10}), PARAMS.estimate_size)
    assert known["training_flops_total"] == 10 * known["training_flops_per_step"]
    ramped = PARAMS.train.model_copy(update={"max_steps": 10, "batch_ramp_levels": 2, "gradient_accumulation_steps": 2})
    assert "training_flops_total" not in metrics(TINY, ramped, PARAMS.estimate_size), "steps of a ramp are smaller"
    tokens = known["training_tokens_per_step"]
    assert known["training_flops_per_step"] == tokens * known["training_flops_per_token"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_training_over_the_budget_is_refused_with_a_remedy_and_one_within_it_is_not(device):
    peak_gib = training_memory(TINY, PARAMS.train, device).peak_bytes / GIB
    check_budget(TINY, PARAMS.train, device, None)
    check_budget(TINY, PARAMS.train, device, peak_gib)
    with pytest.raises(UserError, match=r"memory_budget_gib is .*; training needs .* GiB on .*: lower train.per_dev"):
        check_budget(TINY, PARAMS.train, device, peak_gib * 0.99)


def test_the_table_has_a_row_per_architecture_and_a_line_per_machine():
    row = table_row(Path("mini_model/config_tiny.json"), TINY, PARAMS.train, PARAMS.estimate_size)
    text = markdown_table([row])
    assert "| config_tiny.json | 142,435,584 | 103,507,200" in text
    assert all(f"| {machine.name.ljust(5)}" in text for machine in MACHINES)
    assert set(row["fits"]) == {machine.name for machine in MACHINES}


def test_markdown_columns_are_as_wide_as_their_widest_cell():
    assert markdown_lines(["a", "bbb"], [["cc", "d"]]) == ["| a  | bbb |", "| -- | --- |", "| cc | d   |"]

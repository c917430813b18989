import pytest

from dsv3.tracking.metrics import METRICS, TABLES, curve_names, names_of, place, unknown_names
from dsv3.tracking.stages import SHOWN, charted


def test_every_metric_says_what_it_is_and_names_carry_their_units():
    units = {"_s": "s", "_bytes": "bytes", "_per_s": "/s"}
    for name, metric in METRICS.items():
        assert metric.description, name
        for ending, unit in units.items():
            if name.endswith(ending) and not (ending == "_s" and name.endswith("_per_s")):
                assert metric.unit.endswith(unit), name


def test_the_vocabulary_is_frozen():
    with pytest.raises(TypeError):
        METRICS["speed"] = METRICS["loss"]  # pyright: ignore


def test_index_columns_are_metrics_and_come_first_in_a_table():
    names = list(METRICS)
    for table in TABLES.values():
        assert list(table.index) == sorted(table.index, key=names.index)
        assert set(table.index) <= {"step", "layer", "module", "operand"} == set(names[:4])


def test_a_name_stands_in_index_columns_only():
    texts = {name for name, metric in METRICS.items() if metric.is_text} - {"load_shares"}  # several numbers
    assert texts == {"module", "operand"} == set(TABLES["fp8"].index[1:])


def test_a_rows_place_is_its_index_without_the_step_and_is_part_of_its_curves_names():
    layer = {"step": 3.0, "layer": 1.0, "max_vio": 0.5}  # as read back from a file
    assert place("router", layer) == {"layer": 1}
    assert curve_names("router", layer) == {"train/max_vio/layer_1": 0.5}
    operand = {"step": 3, "module": "model.lm", "operand": "input", "relative_error": 0.03}
    assert place("fp8", operand) == {"module": "model.lm", "operand": "input"}
    assert curve_names("fp8", operand) == {"train/relative_error/model.lm/input": 0.03}
    assert place("history", {"step": 3}) == {}


def test_no_two_tables_of_curves_share_subset_and_index():
    keys = [(table.subset, table.index) for table in TABLES.values()]
    assert len(set(keys)) == len(keys)
    assert TABLES["validation"].subset == SHOWN["evaluate"].charts["validation"][0]


def test_only_metrics_are_charted_and_what_a_stage_lacks_is_left_out():
    names = {name for shown in SHOWN.values() for _, names in shown.charts.values() for name in names}
    assert names <= set(METRICS)
    row = {"mtp_acceptance": 0.6, "nats_per_token": 2.0, "tokens": 10}
    assert charted("evaluate", {"mtp": {"depth_1": row}}) == [("heldout", "mtp_acceptance", 0.6)]
    assert charted("evaluate", {"test": row}) == [("test", "nats_per_token", 2.0)]
    assert charted("sample", {"tokens_per_pass": 1.5}) == [("sample", "tokens_per_pass", 1.5)]
    assert charted("train", {"loss": 1.0}) == charted("download", {"loss": 1.0}) == []


def test_an_unknown_name_is_found():
    assert unknown_names({"loss": 1.0, "los": 1.0, "accuracy": 0.5}) == ["accuracy", "los"]


def test_the_names_of_a_result_are_those_of_its_values_at_any_depth():
    result = {"test": {"loss": 1.0}, "mtp": {"depth_1": {"los": 2.0}}, "perplexity": 3.0, "router": {}}
    assert sorted(names_of(result)) == ["los", "loss", "perplexity"]

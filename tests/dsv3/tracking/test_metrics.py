import pytest

from dsv3.tracking.metrics import METRICS, SUBSETS, TABLES, unknown_names


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
        assert set(table.index) <= {"step", "layer"} == set(names[:2])


def test_no_two_tables_of_curves_share_subset_and_index():
    keys = [(table.subset, table.index) for table in TABLES.values()]
    assert len(set(keys)) == len(keys)
    assert TABLES["validation"].subset == SUBSETS["validation"]


def test_an_unknown_name_is_found():
    assert unknown_names({"loss": 1.0, "los": 1.0, "accuracy": 0.5}) == ["accuracy", "los"]

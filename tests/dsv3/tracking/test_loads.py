import numpy as np
import pytest

from dsv3.artifacts import write_json
from dsv3.tracking.events import Distribution, Heatmap, Row
from dsv3.tracking.loads import ABOVE, BALANCED, BELOW, CELL, ExpertLoads, pixels
from dsv3.tracking.rebuild import rebuild
from dsv3.tracking.recorder import open_recorder
from dsv3.tracking.results import train_events
from dsv3.tracking.tracker import load_tracker


def router_row(step, layer, loads):
    return Row("router", {"step": step, "layer": layer, "max_vio": 0.5, "load_shares": loads})


def test_each_layers_load_is_a_distribution_and_a_validation_shows_the_last_ones_of_all_layers():
    loads = ExpertLoads()
    assert list(loads.events(Row("validation", {"step": 5, "loss": 4.0}))) == []
    (first,) = loads.events(router_row(10, 2, "0.1000 0.9000"))
    assert first == Distribution("load_share", [0.1, 0.9], 10, {"subset": "train", "layer": 2})
    list(loads.events(router_row(10, 1, "0.5000 0.5000")))
    (shown,) = loads.events(Row("validation", {"step": 12, "loss": 4.0}))
    assert isinstance(shown, Heatmap)
    assert (shown.rows, shown.step) == ([[0.5, 0.5], [0.1, 0.9]], 12)
    assert list(loads.events(Row("history", {"step": 20, "loss": 4.0}))) == []


def test_the_map_has_a_cell_per_expert_white_at_the_mean_blue_at_nothing_orange_at_twice():
    picture = pixels([[0.25, 0.25, 0.25, 0.25], [0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert picture.shape == (3 * CELL, 4 * CELL, 3) and picture.dtype == np.uint8
    cells = picture[CELL // 2 :: CELL, CELL // 2 :: CELL].tolist()
    white, orange, blue = list(BALANCED), list(ABOVE), list(BELOW)
    assert cells[0] == [white] * 4
    assert cells[1] == [blue, orange, orange, blue]
    assert cells[2] == [blue] * 4  # a layer without tokens


def test_a_rebuild_shows_the_loads_that_the_training_showed(project, identity, params, indexed):
    aim_context = pytest.importorskip("aim.storage.context", reason="Aim has no wheels for this Python").Context
    runtime = params.runtime.model_copy(update={"trackers": ["aim"]})
    recorder = open_recorder(project / "results/train", runtime, identity)
    for step in (10, 20):
        recorder.log("router", router_row(step, 1, "0.2500 0.7500").cells)
        recorder.log("validation", {"step": step, "loss": 4.0})
    write_json(project / "results/train/run.json", recorder.run_record())
    recorder.close("finished")

    def shown():
        (run,) = indexed(project).iter_runs()
        maps = run.get_image_sequence("load_map", aim_context({"subset": "train"}))
        loads = run.get_distribution_sequence("load_share", aim_context({"subset": "train", "layer": 1}))
        return [sequence.values.sparse_list()[0] for sequence in (maps, loads)], loads.values.sparse_list()[1][
            0
        ].weights

    steps, weights = shown()
    assert steps == [[10, 20], [10, 20]]
    assert weights.tolist() == [0.25, 0.75]
    (project / ".aim").rename(project / "lost")
    rebuild(project / "results", project / "samples.md", params, load_tracker("aim", runtime))
    assert shown()[0] == steps


def test_tables_are_shown_again_in_the_order_in_which_they_were_written(tmp_path):
    (tmp_path / "validation.tsv").write_text("step\tloss\n10\t4\n20\t3\n")
    (tmp_path / "router.tsv").write_text("step\tlayer\tload_shares\n10\t1\t0.5 0.5\n20\t1\t0.2 0.8\n")
    written = [(row.table, row.cells["step"]) for row in train_events(tmp_path / "run.json", 20)]
    assert written == [("router", 10), ("validation", 10), ("router", 20), ("validation", 20)]

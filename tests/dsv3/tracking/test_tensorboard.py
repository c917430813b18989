import pytest
from PIL import Image

from dsv3.tracking.events import Distribution, Figure, Result, Text
from dsv3.tracking.recorder import open_later_stage, open_recorder

pytest.importorskip("tensorboard", reason="a group of its own: pip install --group tensorboard")


SCORES = {"nats_per_token": 4.0, "perplexity": 54.6, "nats_per_char": 1.5, "bits_per_byte": 2.2, "tokens": 7}


@pytest.fixture
def runtime(params):
    return params.runtime.model_copy(update={"trackers": ["tensorboard"]})


def events(project):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (project / "runs").iterdir()
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0})
    accumulator.Reload()
    return accumulator


def test_curves_are_named_by_subset_and_layer(bare_project, identity, runtime):
    recorder = open_recorder(bare_project / "results", runtime, identity)
    recorder.log("history", {"step": 10, "loss": 4.0})
    recorder.log("router", {"step": 10, "layer": 1, "max_vio": 0.5})
    recorder.close("finished")
    assert [(event.step, event.value) for event in events(bare_project).Scalars("train/loss")] == [(10, 4.0)]
    assert [event.value for event in events(bare_project).Scalars("train/max_vio/layer_1")] == [0.5]


def test_a_resumed_training_draws_no_point_twice(bare_project, identity, runtime):
    first = open_recorder(bare_project / "results", runtime, identity)
    first.log("history", {"step": 10, "loss": 4.0})
    state = first.state()
    first.log("history", {"step": 20, "loss": 3.5})
    first.close("interrupted")
    second = open_recorder(bare_project / "results", runtime, identity)
    second.restore(state)
    second.log("history", {"step": 20, "loss": 3.25})
    second.close("finished")
    assert [(event.step, event.value) for event in events(bare_project).Scalars("train/loss")] == [
        (10, 4.0),
        (20, 3.25),
    ]


def test_later_stages_add_to_the_same_folder(bare_project, identity, runtime, tmp_path):
    training = open_recorder(bare_project / "results", runtime, identity)
    training.log("history", {"step": 10, "loss": 4.0})
    training.close("finished")
    Image.new("RGB", (4, 3), "red").save(tmp_path / "load.png")
    views = open_later_stage(training.run_record(), runtime)
    views.write(Result("evaluate", {"test": SCORES}, 10))
    views.write(Text("sample", "To be", 10, {"prompt": "To"}))
    views.write(Figure("expert_load", tmp_path / "load.png", 10))
    views.write(Distribution("load", [3, 1], 10, {"layer": 1}))
    views.close("finished")
    found = events(bare_project)
    assert [event.value for event in found.Scalars("evaluate/test/nats_per_char")] == [1.5]
    assert [event.value for event in found.Scalars("train/loss")] == [4.0]
    assert found.Images("expert_load")[0].width == 4
    assert list(found.Histograms("load/1")[0].histogram_value.bucket) == [3.0, 1.0]

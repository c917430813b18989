import shutil
from dataclasses import replace

import pytest
from PIL import Image

from dsv3.artifacts import write_json
from dsv3.tracking.events import Distribution, Figure, Result, Text
from dsv3.tracking.recorder import add_to_run, open_recorder

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


def test_texts_which_are_markdown_show_names_and_prompts_as_they_are(bare_project, identity, runtime):
    hostile = "a | <script>\n# b"
    changed = replace(identity, changes={"data.path": hostile}, params={"data": {"path": hostile}})
    recorder = open_recorder(bare_project / "results", runtime, changed)
    recorder.show(Text("sample", "To be\r<b>or</b>", 1))
    recorder.close("finished")
    texts = {
        name.removesuffix("/text_summary"): event.tensor_proto.string_val[0].decode()
        for name in events(bare_project).Tags()["tensors"]
        for event in events(bare_project).Tensors(name)
    }
    assert texts["changes"] == r"data.path: a \| &lt;script&gt; # b"
    assert texts["params"].splitlines()[2:] == [r"| data.path | a \| &lt;script&gt; # b |"]
    assert texts["sample"] == "    To be\n    <b>or</b>"


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


def test_later_stages_add_to_the_same_folder(bare_project, identity, runtime, params, tmp_path):
    training = open_recorder(bare_project / "results", runtime, identity)
    training.log("history", {"step": 10, "loss": 4.0})
    training.close("finished")
    Image.new("RGB", (4, 3), "red").save(tmp_path / "load.png")
    write_json(bare_project / "results" / "run.json", training.run_record())
    shown = [
        Result("evaluate", {"test": SCORES}, 10),
        Text("sample", "To be", 10, {"prompt": "To"}),
        Figure("expert_load", tmp_path / "load.png", 10),
        Distribution("load_share", [3, 1], 10, {"layer": 1}),
    ]
    add_to_run(bare_project / "results" / "run.json", params.model_copy(update={"runtime": runtime}), shown)
    found = events(bare_project)
    assert [event.value for event in found.Scalars("evaluate/test/nats_per_char")] == [1.5]
    assert [event.value for event in found.Scalars("train/loss")] == [4.0]
    assert found.Images("expert_load")[0].width == 4
    assert list(found.Histograms("load_share/1")[0].histogram_value.bucket) == [3.0, 1.0]


def test_a_later_stage_is_shown_though_what_the_training_left_is_damaged_which_is_said(
    bare_project, identity, runtime, params, monkeypatch, caplog
):
    monkeypatch.delenv("DVC_EXP_NAME")
    training = open_recorder(bare_project / "results", runtime, identity)
    training.log("history", {"step": 10, "loss": 4.0})
    training.close("finished")
    write_json(bare_project / "results" / "run.json", training.run_record())
    shutil.rmtree(bare_project / "runs")
    (bare_project / "results" / "history.tsv").write_text("loss\n1.0\n")
    own = params.model_copy(update={"runtime": runtime})
    add_to_run(bare_project / "results" / "run.json", own, [Result("evaluate", {"test": SCORES}, 10)])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("the trackers lack what an earlier stage left: ") and "history.tsv:2: is no row" in line
    assert [event.value for event in events(bare_project).Scalars("evaluate/test/nats_per_char")] == [1.5]


def test_an_evaluation_with_other_parameters_has_a_folder_of_its_own_with_the_trainings_curves(
    bare_project, identity, runtime, params, monkeypatch
):
    monkeypatch.delenv("DVC_EXP_NAME")  # the workspace, whose name stays
    training = open_recorder(bare_project / "results", runtime, identity)
    training.log("history", {"step": 10, "loss": 4.0})
    training.close("finished")
    write_json(bare_project / "results" / "run.json", training.run_record())
    evaluate = params.evaluate.model_copy(update={"stride": 16})
    other = params.model_copy(update={"runtime": runtime, "evaluate": evaluate})
    for stage in ("evaluate", "sample"):
        add_to_run(bare_project / "results" / "run.json", other, [Result(stage, {"test": SCORES}, 10)])
    assert len(list((bare_project / "runs").iterdir())) == 2
    shutil.rmtree(bare_project / "runs" / f"union-brig-{identity.key[:8]}")
    assert [event.value for event in events(bare_project).Scalars("train/loss")] == [4.0]

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from aim.storage.context import Context
from PIL import Image

from dsv3.artifacts import write_json
from dsv3.tracking import aim as aim_tracker
from dsv3.tracking.aim import AimTracker
from dsv3.tracking.events import Distribution, Figure, LastLine, Result, Text
from dsv3.tracking.recorder import add_to_run, open_recorder
from dsv3.tracking.results import read_table
from tests.committed import ROOT

SCORES = {"nats_per_token": 4.0, "perplexity": 54.6, "nats_per_char": 1.5, "bits_per_byte": 2.2, "tokens": 7}


@pytest.fixture
def runtime(params):
    return params.runtime.model_copy(update={"trackers": ["aim"], "aim_repo": None})


def curve(run, name, context):
    metric = run.get_metric(name, Context(context))
    assert metric is not None, (name, context)
    steps, (values, *_) = metric.data.numpy()
    return dict(zip(steps.tolist(), values.tolist(), strict=True))


def test_a_run_carries_its_identity_and_curves_with_subset_and_layer(project, identity, runtime, indexed):
    recorder = open_recorder(project / "results", runtime, identity)
    recorder.log("history", {"step": 10, "epoch": 0.5, "loss": 4, "learning_rate": 1e-3})
    recorder.log("history", {"step": 20, "epoch": 1.0, "loss": 3.5, "learning_rate": 1e-3})
    recorder.log("validation", {"step": 20, "loss": 3.75})
    recorder.log("router", {"step": 20, "layer": 2, "max_vio": 0.5})
    recorder.log("fp8", {"step": 20, "module": "model", "operand": "input", "relative_error": 0.25})
    recorder.close("finished")
    (run,) = indexed(project).iter_runs()
    assert run.hash == recorder.run_hash
    assert (run.name, run.experiment) == (identity.title, "config_nano")
    assert set(run.tags) == {*identity.tags, *identity.change_tags}
    assert run["params"] == identity.params
    assert run["architecture", "rope_scaling", "type"] == "yarn"
    assert run["dvc", "exp_name"] == "union-brig"
    assert run["env", "device"] == "cpu"
    assert run["size", "parameters"] == 5
    assert run["status"] == "finished"
    assert run.end_time is not None
    assert curve(run, "loss", {"subset": "train"}) == {10: 4.0, 20: 3.5}
    assert curve(run, "loss", {"subset": "val"}) == {20: 3.75}
    assert curve(run, "max_vio", {"subset": "train", "layer": 2}) == {20: 0.5}
    context = {"subset": "train", "module": "model", "operand": "input"}
    assert curve(run, "relative_error", context) == {20: 0.25}


@pytest.mark.parametrize(("is_asked", "shown"), [(False, ["model"]), (True, ["model", "model.layers.0"])])
def test_fp8s_curves_of_each_operand_are_shown_on_request_and_always_in_the_table(
    project, identity, runtime, indexed, is_asked, shown
):
    runtime = runtime.model_copy(update={"track_fp8_operands": is_asked})
    recorder = open_recorder(project / "results", runtime, identity)
    rows = [{"step": 20, "module": module, "operand": "input"} for module in ("model", "model.layers.0")]
    for row in rows:
        recorder.log("fp8", {**row, "relative_error": 0.25})
    recorder.close("finished")
    (run,) = indexed(project).iter_runs()
    assert sorted(metric.context["module"] for metric in run.metrics() if metric.name == "relative_error") == shown
    assert [row["module"] for row in read_table(project / "results" / "fp8.tsv", ["step"])] == [
        "model",
        "model.layers.0",
    ]


def test_a_resumed_training_goes_on_in_its_run_without_doubles(project, identity, runtime, indexed):
    first = open_recorder(project / "results", runtime, identity)
    first.log("history", {"step": 10, "loss": 4.0})
    state = first.state()
    first.log("history", {"step": 20, "loss": 3.5})
    first.close("interrupted")
    second = open_recorder(project / "results", runtime, identity, first.run_hash)
    second.restore(state)
    second.log("history", {"step": 20, "loss": 3.25})
    second.close("finished")
    assert second.run_hash == first.run_hash
    (run,) = indexed(project).iter_runs()
    assert curve(run, "loss", {"subset": "train"}) == {10: 4.0, 20: 3.25}
    assert run["status"] == "finished"


def test_a_run_that_this_clone_never_saw_is_made_under_its_hash_with_all_rows(project, identity, runtime, indexed):
    recorder = open_recorder(project / "results", runtime, identity, "0123456789abcdef01234567")
    recorder.restore({"history": [{"step": 10, "loss": 4.0}]})
    recorder.close("finished")
    (run,) = indexed(project).iter_runs()
    assert run.hash == recorder.run_hash == "0123456789abcdef01234567"
    assert curve(run, "loss", {"subset": "train"}) == {10: 4.0}


def test_a_run_that_did_not_finish_carries_the_tag_until_it_does(project, identity, runtime, indexed):
    first = open_recorder(project / "results", runtime, identity)
    (run,) = indexed(project).iter_runs()
    assert run["status"] == "running"
    first.close("interrupted")
    (run,) = indexed(project).iter_runs()
    assert "interrupted" in run.tags
    assert run["status"] == "interrupted"
    open_recorder(project / "results", runtime, identity, first.run_hash).close("finished")
    (run,) = indexed(project).iter_runs()
    assert not {"interrupted", "failed"} & set(run.tags)


@pytest.fixture
def trained(project, identity, runtime) -> Path:
    """The run.json of a training with one row and a scored evaluation."""
    recorder = open_recorder(project / "results" / "train", runtime, identity)
    recorder.log("history", {"step": 30, "loss": 4.0})
    path = project / "results" / "train" / "run.json"
    write_json(path, recorder.run_record())
    recorder.close("finished")
    return path


def test_an_experiment_that_only_evaluates_and_samples_has_one_run_of_its_own(
    trained, project, runtime, params, indexed, monkeypatch
):
    score = Result("evaluate", {"heldout": SCORES}, 30)
    add_to_run(trained, params.model_copy(update={"runtime": runtime}), [score])
    (before,) = indexed(project).iter_runs()
    monkeypatch.setenv("DVC_EXP_NAME", "evonly")
    evaluate = params.evaluate.model_copy(update={"stride": 16})
    other = params.model_copy(update={"runtime": runtime, "evaluate": evaluate})
    add_to_run(trained, other, [Result("evaluate", {"heldout": {**SCORES, "nats_per_char": 1.6}}, 30)])
    add_to_run(trained, other, [Text("sample", "To be or", 30, {"prompt": "To be"})])
    runs = {run["dvc", "exp_name"]: run for run in indexed(project).iter_runs()}
    assert set(runs) == {"union-brig", "evonly"}
    first, second = runs["union-brig"], runs["evonly"]
    context = {"subset": "heldout", "stage": "evaluate"}
    assert (curve(first, "nats_per_char", context), first["params", "evaluate", "stride"]) == (
        {30: 1.5},
        params.evaluate.stride,
    )
    assert (curve(second, "nats_per_char", context), second["params", "evaluate", "stride"]) == ({30: 1.6}, 16)
    assert curve(second, "loss", {"subset": "train"}) == {30: 4.0}
    assert second.get_text_sequence("sample", Context({"prompt": "To be"})) is not None
    assert first.duration == before.duration
    assert second["dvc", "training"] == "union-brig"


def test_the_stages_after_a_training_without_aim_share_one_run(project, identity, runtime, params, indexed):
    path = project / "results" / "train" / "run.json"
    recorder = open_recorder(path.parent, runtime.model_copy(update={"trackers": []}), identity)
    recorder.log("history", {"step": 30, "loss": 4.0})
    write_json(path, recorder.run_record())
    recorder.close("finished")
    own = params.model_copy(update={"runtime": runtime})
    add_to_run(path, own, [Result("evaluate", {"heldout": SCORES}, 30)])
    add_to_run(path, own, [Text("sample", "To be or", 30, {"prompt": "To be"})])
    (run,) = indexed(project).iter_runs()
    assert curve(run, "loss", {"subset": "train"}) == {30: 4.0}
    assert curve(run, "nats_per_char", {"subset": "heldout", "stage": "evaluate"}) == {30: 1.5}
    assert run.get_text_sequence("sample", Context({"prompt": "To be"})) is not None


def test_a_stage_of_the_same_experiment_does_not_stretch_the_trainings_duration(
    trained, project, runtime, params, indexed
):
    (before,) = indexed(project).iter_runs()
    add_to_run(trained, params.model_copy(update={"runtime": runtime}), [Result("evaluate", {"test": SCORES}, 30)])
    (after,) = indexed(project).iter_runs()
    assert after.duration == before.duration
    assert after["evaluate", "test", "tokens"] == 7


def test_name_tags_and_description_say_what_differs_from_the_baseline(project, identity, runtime, indexed):
    changes = {"train.use_fp8": True, "train.learning_rate": 0.004, "n_routed_experts": 16}
    changed = replace(identity, changes=changes)
    open_recorder(project / "results", runtime, changed).close("finished")
    (run,) = indexed(project).iter_runs()
    assert run.name == "union-brig · train.use_fp8: true · train.learning_rate: 0.004 · …"
    assert {"train.use_fp8: true", "n_routed_experts: 16"} <= set(run.tags)
    assert run.description == "train.use_fp8: true, train.learning_rate: 0.004, n_routed_experts: 16"


def test_later_stages_add_their_results_to_the_same_run(trained, project, runtime, params, indexed, tmp_path):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "load.png")
    events = [
        Result("evaluate", {"test": SCORES, "heldout": {**SCORES, "nats_per_char": 1.6}}, 30),
        Text("sample", "To be\nor not", 30, {"prompt": "To be"}),
        Figure("expert_load", tmp_path / "load.png", 30),
        Distribution("load_share", [3, 1, 2], 30, {"layer": 1}),
    ]
    add_to_run(trained, params.model_copy(update={"runtime": runtime}), events)
    (run,) = indexed(project).iter_runs()
    assert run["evaluate", "test", "tokens"] == 7
    assert run["params", "seed"] == 1337
    assert curve(run, "nats_per_char", {"subset": "test", "stage": "evaluate"}) == {30: 1.5}
    assert curve(run, "nats_per_char", {"subset": "heldout", "stage": "evaluate"}) == {30: 1.6}
    assert run.get_metric("tokens", Context({"subset": "test", "stage": "evaluate"})) is None
    text = run.get_text_sequence("sample", Context({"prompt": "To be"}))
    assert text.values.sparse_list()[1][0].data == "To be\nor not"
    image = run.get_image_sequence("expert_load", Context({}))
    assert image.values.sparse_list()[1][0].size == (4, 3)
    load = run.get_distribution_sequence("load_share", Context({"layer": 1})).values.sparse_list()[1][0]
    assert load.weights.tolist() == [3, 1, 2]
    assert list(load.range) == [0, 3]


def test_the_configured_repository_wins_over_dvcs_root(bare_project, identity, tmp_path, params):
    runtime = params.runtime.model_copy(update={"trackers": ["aim"], "aim_repo": str(tmp_path / "elsewhere" / ".aim")})
    recorder = open_recorder(bare_project / "results", runtime, identity)
    recorder.close("finished")
    assert (tmp_path / "elsewhere" / ".aim" / "VERSION").is_file()
    assert not (bare_project / ".aim").exists()
    assert recorder.run_record()["aim_repo"] == runtime.aim_repo


def test_a_repository_that_cannot_be_made_costs_a_warning(bare_project, identity, runtime, caplog):
    (bare_project / ".aim").write_text("in the way")
    recorder = open_recorder(bare_project / "results", runtime, identity)
    recorder.log("history", {"step": 1, "loss": 1.0})
    recorder.close("finished")
    assert recorder.run_hash is None
    assert [message.startswith("tracker aim failed") for message in caplog.messages] == [True]
    assert (bare_project / "results" / "history.tsv").read_text() == "step\tloss\n1\t1\n"


def test_why_a_repository_gets_no_tables_is_one_line(bare_project, identity, runtime, caplog, capfd, monkeypatch):
    full = [sys.executable, "-c", "raise OSError('no room')"]  # in the place of Aim's process that makes tables
    monkeypatch.setattr(aim_tracker, "create_migration_cmd", lambda: full)
    open_recorder(bare_project / "results", runtime, identity).close("finished")
    assert "no tables: OSError: no room" in caplog.text
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_terminal_and_machine_are_recorded_only_for_a_training_under_dvc(project, identity, monkeypatch):
    out, tracker = sys.stdout.write, AimTracker(None)
    run_hash = tracker.open(identity, None, "train")
    assert sys.stdout.write == out
    tracker.close("finished")
    monkeypatch.setenv("DVC_STAGE", "train")
    tracker.open(identity, run_hash, "add")
    assert sys.stdout.write == out
    tracker.close("finished")
    tracker.open(identity, run_hash, "train")
    assert sys.stdout.write != out
    tracker.close("finished")
    assert sys.stdout.write == out


def test_the_log_begins_with_the_plan_and_ends_with_why_the_training_stopped(
    project, identity, runtime, indexed, monkeypatch
):
    monkeypatch.setenv("DVC_STAGE", "train")
    planned = replace(identity, plan_summary="model  <b>.json\nsteps  30")
    first = open_recorder(project / "results", runtime, planned)
    print("step 10: validation 2.7")
    first.show(LastLine("stopped after step 12 of 30, saved"))
    first.close("interrupted")
    second = open_recorder(project / "results", runtime, planned, first.run_hash)
    print("step 20: validation 1.7")
    second.close("finished")
    (run,) = indexed(project).iter_runs()
    lines = [line.data for line in run.get_terminal_logs().values.sparse_list()[1]]
    assert [line for line in lines if line] == [
        *("model  &lt;b&gt;.json", "steps  30", "step 10: validation 2.7", "stopped after step 12 of 30, saved"),
        *("model  &lt;b&gt;.json", "steps  30", "step 20: validation 1.7"),
    ]
    assert run.hash == first.run_hash == second.run_hash
    assert run["status"] == "finished"


def test_processes_that_start_together_initialize_one_repository(bare_project):
    script = "import sys; from dsv3.tracking.aim import initialize; initialize(sys.argv[1])"
    command = [sys.executable, "-c", script, str(bare_project)]
    starts = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait(timeout=120) for process in starts] == [0, 0, 0]
    assert (bare_project / ".aim" / "VERSION").is_file()
    assert not (bare_project / ".aim.lock").exists()


LEAVES_OPEN = """
import atexit
import sys

from aim.ext.cleanup import AutoClean

atexit.register(lambda: print("open:", sum(finalizer.alive for _, finalizer in AutoClean._finalizers.values())))
AutoClean.cleanup = staticmethod(lambda: print("in a thread"))

import aim

from dsv3.tracking.aim import initialize

initialize(sys.argv[1])
run = aim.Run(repo=sys.argv[1], system_tracking_interval=None)
"""


def test_what_is_open_at_the_end_of_a_process_is_closed_without_a_thread(tmp_path):
    """From Python 3.12 on none can be started there: Aim's own way ends in a traceback and closes nothing."""
    command = [sys.executable, "-W", "ignore", "-c", LEAVES_OPEN, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("open: 0\n", "")


@pytest.mark.parametrize("module", ["aim.ext.resource.tracker", "dsv3.made_up"])
def test_a_thread_of_aims_that_ends_on_a_full_disk_costs_one_line_and_others_are_reported_as_ever(
    monkeypatch, caplog, module
):
    told, skipped = [], []
    monkeypatch.setattr(aim_tracker, "skip_shutdown", lambda: skipped.append(True))
    names = {"__name__": module}
    exec("def fails():\n    raise OSError('No space left')", names)  # as code of that module
    try:
        names["fails"]()
    except OSError as error:
        ended = threading.ExceptHookArgs((type(error), error, error.__traceback__, None))
    aim_tracker.report_ended_thread(ended, told.append)
    is_aims = module.startswith("aim.")
    assert told == ([] if is_aims else [ended])
    assert skipped == ([True] if is_aims else [])
    assert len(caplog.messages) == is_aims
    assert all("has ended (OSError: No space left); the run goes on" in message for message in caplog.messages)


def test_python_asks_it_about_threads_that_end():
    program = "import threading, dsv3.tracking.aim as aim; assert threading.excepthook is aim.report_ended_thread"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_lines_that_are_written_while_aim_stores_others_stay_whole_and_nobody_waits():
    stored = {}

    def store(line, name, step):
        stored[step] = line.data
        if len(stored) == 1:  # the terminal's next words, while this thread of Aim's is at work
            record._buffer_registry[id(record)].write(b"end\nnext\n")

    record = aim_tracker.WholeLines(store, None)
    record.start()
    try:
        record._buffer_registry[id(record)].write(b"first\nthe ")
        record._store_buffered_logs()
    finally:
        record.stop()
    assert [stored[step] for step in sorted(stored)] == ["first", "the end", "next", ""]


def test_aim_records_a_terminal_by_that():
    assert aim_tracker.aim.sdk.run.ResourceTracker is aim_tracker.WholeLines

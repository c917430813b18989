"""dvc.yaml tells the truth: a stage re-runs when what shapes its results has changed."""

import ast
import json
import re
import subprocess
from dataclasses import fields

import pytest

from dsv3.dependencies import ROOT, dependencies
from dsv3.fp8.recipe import Recipe
from dsv3.params.read import Params
from dsv3.tracking.metrics import HEADLINE
from dsv3.tracking.stages import SHOWN
from tests.committed import PROJECT, committed_text
from tests.contracts import import_closure
from tests.dvc_yaml import PIPELINE, STAGES, arguments_of, deps_of, outputs_of, paths_of

NAMES = list(STAGES)


def sections_read_by(name: str) -> set[str]:
    """The sections that a stage's code reads from the validated parameters, by whatever name it holds them."""
    sections = set(Params.model_fields) - {"runtime"}
    read = set()
    for file in dependencies(name):
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Attribute) and node.attr in sections):
                continue
            owner = node.value.func if isinstance(node.value, ast.Call) else node.value
            holder = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            if holder in {"params", "parameters", "read_params"}:
                read.add(node.attr)
    return read


def test_every_module_of_stages_is_a_stage_and_the_other_way_round():
    modules = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert modules == set(NAMES)


def test_the_stages_stand_in_an_order_in_which_they_can_run():
    made: set[str] = set()
    all_outputs = set().union(*map(outputs_of, STAGES.values()))
    for name, stage in STAGES.items():
        assert deps_of(stage) & all_outputs <= made, name
        made |= outputs_of(stage)


@pytest.mark.parametrize("name", NAMES)
def test_code_dependencies_are_the_code_that_shapes_the_results(name: str):
    declared = {path for path in deps_of(STAGES[name]) if path.endswith(".py")}
    shaping = set(dependencies(name))
    assert declared == shaping, (
        f"missing: {sorted(shaping - declared)}; idle: {sorted(declared - shaping)}; "
        "python -m tests.contracts.import_closure mends it, below a line `deps:`"
    )


@pytest.mark.parametrize("deps", ["", " []", "\n      - data/corpus", "\n      - stages/old.py\n      - data/corpus"])
def test_code_dependencies_are_written_for_any_stage_that_has_a_place_for_them(monkeypatch, deps: str):
    monkeypatch.setattr(import_closure, "dependencies", lambda stage: [f"stages/{stage}.py"])
    pipeline = "stages:\n  {0}:\n    cmd: python\n    deps:{1}\n    outs: [a]\n\n  last:\n    deps:\n    outs: [b]\n"
    data = "\n      - data/corpus" if "data" in deps else ""
    expected = pipeline.format("mix_2", f"\n      - stages/mix_2.py{data}")
    expected = expected.replace("last:\n    deps:", "last:\n    deps:\n      - stages/last.py")
    assert import_closure.refreshed(pipeline.format("mix_2", deps)) == expected
    assert import_closure.refreshed(expected) == expected


@pytest.mark.parametrize("name", NAMES)
def test_params_are_the_sections_that_the_stage_reads(name: str):
    assert set(STAGES[name].get("params", ())) == sections_read_by(name)


def test_what_differs_between_machines_reruns_no_stage():
    assert all("runtime" not in stage.get("params", ()) for stage in STAGES.values())
    assert all("dsv3/params/runtime.py" not in deps_of(stage) for stage in STAGES.values())


@pytest.mark.parametrize("name", ["evaluate", "sample"])
def test_a_new_parameter_of_the_training_reruns_nothing_that_follows(name: str):
    assert "train" not in STAGES[name]["params"]
    assert not {"dsv3/params/train.py", "dsv3/params/read.py"} & deps_of(STAGES[name])


def test_no_estimate_reruns_a_training():
    # What train depends on of estimate_size is missing where a training is refused, and always the same where not.
    estimates = outputs_of(STAGES["estimate_size"]) & deps_of(STAGES["train"])
    assert estimates == {"results/estimate_size/accepted.txt"}


@pytest.mark.parametrize("name", NAMES)
def test_the_command_runs_the_stage_of_its_name_as_a_module(name: str):
    # As a script, stages/tokenize.py would shadow the standard library's tokenize, and torch could not be imported.
    assert STAGES[name]["cmd"].startswith(f"python -m stages.{name} ")


@pytest.mark.parametrize("name", NAMES)
def test_every_path_in_the_command_is_declared(name: str):
    stage = STAGES[name]
    declared = deps_of(stage) | outputs_of(stage)
    paths = [word for word in arguments_of(stage) if not word.startswith("--")]
    assert paths
    for path in paths:
        inside = any(
            other == path or other.startswith(f"{path}/") or path.startswith(f"{other}/") for other in declared
        )
        assert inside, f"{path} is neither a dependency nor an output of {name}"


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_says_what_it_does(name: str):
    assert len(STAGES[name]["desc"]) > 10


def test_dvcs_metrics_are_the_headline_numbers_and_every_stage_keeps_all_of_its_numbers_beside_them():
    metrics = {name: paths_of(stage["metrics"]) for name, stage in STAGES.items() if "metrics" in stage}
    assert metrics == {name: {f"results/{name}/headline.json"} for name in metrics}
    assert all(f"results/{name}/metrics.json" in STAGES[name]["outs"] for name in metrics)
    numbers = [json.loads(committed_text(path)) for paths in metrics.values() for path in paths]
    assert sorted(key for each in numbers for key in each) == sorted(HEADLINE)
    assert len(HEADLINE) <= 8 and max(map(len, HEADLINE)) <= 12  # the table of `dvc exp show` fits a terminal


def test_what_is_shown_is_of_stages_and_read_from_their_outputs():
    assert set(SHOWN) <= set(NAMES), "dsv3/tracking/stages.py has a row for what is no stage"
    for name, shown in SHOWN.items():
        outputs = [path for path in paths_of(STAGES[name]["outs"]) if path.rpartition("/")[2] == shown.output]
        assert len(outputs) == 1, f"{name}: {shown.output}"
    assert [
        name
        for name, shown in SHOWN.items()
        if shown.lines and f"results/{name}/metrics.json" not in outputs_of(STAGES[name])
    ] == []


def test_only_metrics_and_plots_stay_out_of_the_cache():
    # Any other uncached output switches the run-cache off for its stage.
    for name, stage in STAGES.items():
        for entry in stage.get("outs", []):
            assert isinstance(entry, str), f"{name}: {entry} has flags"


@pytest.mark.parametrize("name", NAMES)
def test_git_ignores_what_dvc_holds_and_nothing_else(name: str):
    # Then DVC writes no .gitignore of its own, and a new stage needs none.
    stage = STAGES[name]
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    options = [next(iter(entry.items())) if isinstance(entry, dict) else (entry, {}) for entry in entries]
    held = {path for path, flags in options if flags.get("cache", True)}
    command = ["git", "check-ignore", "--no-index", *(path for path, _ in options)]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False).stdout
    assert set(ignored.splitlines()) == held


@pytest.mark.parametrize("name", NAMES)
def test_every_table_is_drawn_over_an_axis_of_its_own_under_a_title_that_dvcs_page_can_show(name: str):
    for entry in STAGES[name].get("plots", []):
        (path, options) = next(iter(entry.items()))
        if path.endswith(".tsv"):
            assert {"x", "y", "title"} <= set(options), path
            assert not set("'\"") & set(options["title"]), path  # the page is JavaScript, and quotes nothing


def test_dvcs_page_can_show_the_titles_of_the_plots_of_several_tables():
    titles = [next(iter(plot)) for plot in PIPELINE["plots"] if isinstance(plot, dict)]
    assert titles
    assert [title for title in titles if set("'\"") & set(title)] == []


def test_every_line_of_params_yaml_is_commented():
    lines = (PROJECT / "params.yaml").read_text(encoding="utf-8").splitlines()
    keyed = [line for line in lines if re.match(r"\s+[a-z_0-9]+:", line)]
    assert keyed
    assert [line for line in keyed if "#" not in line] == []


RECIPE = {f"fp8_{field.name}" for field in fields(Recipe)}
"""Parameters that `dsv3.training.precision.fp8_recipe` reads by the recipe's own names."""


def test_every_parameter_is_read_somewhere():
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for package in ("dsv3", "stages")
        for path in (ROOT / package).rglob("*.py")
        if path.parent != ROOT / "dsv3/params"
    )
    for section, field in Params.model_fields.items():
        names = getattr(field.annotation, "model_fields", {})
        unread = [name for name in names if name not in RECIPE and not re.search(rf"\.{name}\b", sources)]
        assert unread == [], f"{section}: {unread}"


def test_plots_and_artifacts_name_outputs_of_stages():
    outputs = set().union(*(outputs_of(stage) for stage in STAGES.values()))
    plotted = {
        path
        for plot in PIPELINE["plots"]
        for path in ([plot] if isinstance(plot, str) else next(iter(plot.values()))["y"])
    }
    assert plotted <= outputs
    assert {artifact["path"] for artifact in PIPELINE["artifacts"].values()} <= outputs

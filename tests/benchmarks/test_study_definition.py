import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks.studies.definition import Study, read_study, run_flags, run_names, study_names, teacher_runs
from dsv3.errors import UserError
from dsv3.params.architecture import read_architecture
from dsv3.params.read import read_yaml, validated
from dsv3.presets import merged, read_preset
from tests.committed import DEFAULTS, PROJECT

ROOT = Path(__file__).parents[2]
STUDIES = {name: read_study(name) for name in study_names()}
VARIANTS = [(name, variant) for name, study in STUDIES.items() for variant in study.variants]


def overlay(study: Study, variant: str) -> dict:
    return {**study.common, **study.variants[variant].set}


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_what_a_variant_sets_exists_and_gives_valid_parameters(name, variant, tmp_path):
    params = read_yaml(PROJECT / "params.yaml")
    config = json.loads((PROJECT / params["model"]["config"]).read_text())
    values = overlay(STUDIES[name], variant)
    of_params = {key: value for key, value in values.items() if ":" not in key}
    for key, value in values.items():
        if ":" in key:
            file, field = key.split(":")
            assert file == params["model"]["config"], "another architecture's file would change nothing"
            assert field in config
            config[field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_architecture(tmp_path / "config.json")
    params["model"]["config"] = str(tmp_path / "config.json")
    validated(merged(params, of_params), PROJECT / "params.yaml")


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_but_the_baseline_differs_from_the_defaults(name, variant):
    study = STUDIES[name]
    defaults = DEFAULTS.model_dump()
    config = json.loads((PROJECT / defaults["model"]["config"]).read_text())
    changed = {}
    for key, value in study.variants[variant].set.items():
        section, _, field = key.replace(":", ".").rpartition(".")
        changed[key] = value != (config[field] if ":" in key else defaults[section][field])
    own = changed or study.variants[variant].seed_offset
    assert all(changed.values()) and bool(own) == (variant != study.baseline), changed


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_a_baseline_distinct_seeds_and_a_page_with_its_section(name):
    study = STUDIES[name]
    assert study.baseline in study.variants
    assert len(set(study.seeds)) == len(study.seeds) >= 3
    assert f"<!-- begin {name} -->" in (ROOT / study.document).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", STUDIES)
def test_what_is_said_of_a_variant_is_no_result(name):
    for variant in STUDIES[name].variants.values():
        words = f"{variant.part} {variant.change}".lower()
        assert not any(word in words for word in ("%", "nats", "±", "better", "worse", "no effect"))


def test_a_run_is_named_and_flagged_by_study_variant_and_seed():
    study = STUDIES["ablations"]
    names = run_names("ablations", study)
    assert names["ablations-kv-rank-32-1338"] == ("kv-rank-32", 1338)
    assert len(names) == len(study.variants) * len(study.seeds)
    assert list(names)[: len(study.variants)] == [f"ablations-{variant}-1337" for variant in study.variants]
    flags = run_flags("ablations", study, "kv-rank-32", 1338)
    assert flags[::2] == ["-S"] * 6
    assert flags[1::2] == [
        "seed=1338",
        "runtime.experiment=ablations",
        "train.weight_decay=0.1",
        "train.num_train_epochs=1.0",
        "sample.max_new_tokens=8",
        "mini_model/config_nano.json:kv_lora_rank=32",
    ]


def test_the_student_of_the_study_is_the_preset_of_quality():
    params = read_yaml(PROJECT / "params.yaml")
    overlays = [overlay(STUDIES["distillation"], "student"), read_preset("quality_cpu")]
    asked = [merged(params, each) for each in overlays]
    sections = [{name: part for name, part in each.items() if name != "sample"} for each in asked]
    assert sections[0] == sections[1]


def test_teachers_are_runs_of_the_same_seed_whose_own_seeds_differ():
    variants = {
        "one": {"part": "a", "change": "b", "seed_offset": 100},
        "two": {"part": "a", "change": "b", "seed_offset": 200},
        "student": {"part": "a", "change": "b", "teachers": ["one", "two"]},
    }
    study = Study.model_validate(
        {"document": "x", "figure": "dots", "baseline": "one", "seeds": [7, 8], "variants": variants}
    )
    assert teacher_runs("s", study, "student", 7) == ["s-one-7", "s-two-7"]
    assert [run_flags("s", study, name, 7)[1] for name in variants] == ["seed=107", "seed=207", "seed=7"]


@pytest.mark.parametrize("teacher", ["student", "later", "unknown"])
def test_a_teacher_is_one_of_the_variants_before(teacher):
    variants = {name: {"part": "a", "change": "b"} for name in ("first", "student", "later")}
    variants["student"]["teachers"] = ["first", teacher]
    with pytest.raises(ValidationError, match=rf"student names the teacher {teacher}; must be one of .*'first'\]"):
        Study.model_validate(
            {"document": "x", "figure": "dots", "baseline": "first", "seeds": [7], "variants": variants}
        )


def test_an_unknown_study_is_answered_with_the_known_ones():
    with pytest.raises(
        UserError, match=r"^none is no study; known: ablations, distillation, precision, regularization, scaling$"
    ):
        read_study("none")

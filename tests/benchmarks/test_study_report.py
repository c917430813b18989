import re
import statistics
from dataclasses import replace

import pytest

from benchmarks.studies.figures import figure
from benchmarks.studies.pages import replace_section
from benchmarks.studies.report import section
from benchmarks.studies.statistics import differences, relative_gap, smoothed
from dsv3.errors import UserError
from dsv3.statistics import Sample
from tests.benchmarks.studies_made_up import RESULT, STUDY, results


def report(found, study=STUDY) -> str:
    return section("study", study, found, "two at a time", "figures/study.png")


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def loss_sentence(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("- **Other**")]
    return re.findall(r"The held-out loss .*?\)\.", line)[0]


def test_the_table_holds_mean_and_deviation_and_the_difference_seed_by_seed():
    cells = row(report(results([0.01, 0.02, 0.03])), "other")
    assert cells[1] == "3"
    assert cells[3] == f"1.7200 ± {statistics.stdev([1.61, 1.72, 1.83]):.4f}"
    assert cells[5] == "+0.0200 ± 0.0100"  # far less than the seeds differ from each other
    assert row(report(results([0.01, 0.02, 0.03])), "base")[5] == ""


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([0.020, 0.021, 0.022], "rose by 0.0210 nats/char"),
        ([-0.020, -0.021, -0.022], "fell by 0.0210 nats/char"),
        ([0.001, 0.021, 0.041], "did not change beyond noise: +0.0210 nats/char"),
    ],
)
def test_a_difference_counts_only_when_zero_lies_outside_its_interval(found, told):
    sentence = loss_sentence(report(results(found)))
    assert told in sentence
    assert sentence.endswith("3 seeds).")


def test_the_interval_is_students():
    sample = Sample((1.0, 2.0, 3.0))
    assert sample.half_interval == pytest.approx(4.303 / 3**0.5)
    assert not sample.is_established
    assert Sample((2.0, 2.5, 3.0)).is_established


def test_one_seed_is_no_evidence_and_says_so():
    text = report(results([0.5]))
    assert "changed by +0.5000 nats/char, in a single seed: that is no evidence." in text
    assert "±" not in row(text, "other")[5]


def test_an_unfinished_study_says_how_many_runs_it_has_and_compares_only_seeds_that_both_have():
    found = results([0.01, 0.02, 0.03])[:-1]  # the last seed of `other` is missing
    text = report(found)
    assert "5 of 9 runs have finished. **The study is not complete.**" in text
    assert row(text, "other")[1] == "2"
    assert differences(found, "other", "base", lambda r: r.nats_per_char).values == pytest.approx((0.01, 0.02))
    assert "absent" not in text


def test_a_study_without_runs_says_how_to_make_them():
    assert "python -m benchmarks.study run study" in report([])


def test_every_run_is_listed_with_its_gap_to_the_baseline_of_its_seed():
    found = results([0.0, 0.0, 0.0])
    found[3] = replace(found[3], validation_loss=4.004)
    text = report(found)
    assert row(text, "study-other-2")[1:3] == ["4.0040", "+0.100"]
    assert row(text, "study-base-2")[2] == ""


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([4.004, 4.004, 4.005], "within the goal of 0.25 %."),
        ([4.0, 4.0, 4.02], "within the goal of 0.25 %, though the interval reaches beyond it."),
        ([4.02, 4.02, 4.021], "beyond the goal of 0.25 %."),
        ([4.008, 4.012, 4.016], "beyond the goal of 0.25 %, though the interval reaches within it."),
        ([4.0, 4.02, 4.04], "beyond the goal of 0.25 %, though zero lies within the interval."),
    ],
)
def test_the_goal_is_judged_by_the_mean_and_its_interval(losses, verdict):
    base = results([0.0, 0.0, 0.0])
    found = base[::2] + [replace(own, validation_loss=loss) for own, loss in zip(base[1::2], losses, strict=True)]
    sentence = report(found).split("The final validation loss")[1].split(" The smoothed training loss")[0]
    assert sentence.endswith(verdict)


def test_the_training_loss_is_judged_too():
    found = [
        replace(r, losses={step: 1.003 * loss for step, loss in r.losses.items()}) if r.variant == "other" else r
        for r in results([0.0, 0.0, 0.0])
    ]
    assert (
        "The smoothed training loss, at the end, lies +0.300 % (95 % interval ± 0.000) from `base`'s, beyond"
        in report(found)
    )


def test_an_emulated_variant_is_labelled():
    found = [replace(r, computed="fp8_emulated") if r.variant == "other" else r for r in results([0.1, 0.2, 0.3])]
    assert "changed other. Computed as fp8_emulated." in report(found)
    assert "| `other`, emulated | 3 |" in report(found)


@pytest.mark.parametrize("kind", ["dots", "curves"])
@pytest.mark.parametrize("num_seeds", [1, 3])
def test_both_figures_take_complete_and_partial_results(kind, num_seeds):
    study = STUDY.model_copy(update={"figure": kind})
    drawn = figure(study, results([0.1, 0.2, 0.3][:num_seeds]))
    labels = [text.get_text() for axes in drawn.axes for text in axes.get_yticklabels()]
    assert len(drawn.axes) == 2
    assert kind == "curves" or "other" in labels


def test_smoothing_keeps_a_constant_and_the_gap_is_in_percent():
    assert smoothed({1: 2.0, 2: 2.0, 3: 2.0}) == pytest.approx({1: 2.0, 2: 2.0, 3: 2.0})
    higher = replace(RESULT, losses={step: 1.01 * loss for step, loss in RESULT.losses.items()})
    assert relative_gap(higher, RESULT) == pytest.approx({10: 1.0, 20: 1.0})


def test_only_the_marked_section_of_a_page_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin a -->\nold\n<!-- end a -->\nafter \\1\n")
    for _ in range(2):
        replace_section(page, "a", "new \\1\n")
        assert page.read_text() == "before\n<!-- begin a -->\n\nnew \\1\n\n<!-- end a -->\nafter \\1\n"
    with pytest.raises(UserError, match="0 sections between <!-- begin b -->"):
        replace_section(page, "b", "new")

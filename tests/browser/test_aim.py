"""What a person sees after README's first experiment: two real runs, `make ui`, and Aim's pages in Chromium."""

import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv3.tracking.views import BOOKMARKS, HOST, samples_path
from tests.browser.pages import CHROMIUM, DRIVER, Pages, browser, interface
from tests.pipeline.laboratory import Laboratory

pytestmark = pytest.mark.browser

PATHS = {view.key: view.path for view in BOOKMARKS} | {"samples": samples_path()}
MARKS = {
    "loss": ".LineChart path.Line",
    "cost": ".ScatterPlot circle.Circle",
    "balance": ".LineChart path.Line",
    "loads": ".ImageBox img",
    "figures": ".ImageBox img",
    "runs": ".HighPlot__container path.Line",
    "samples": ".TextBox pre",
}
"""What each view draws, of which both runs have at least one."""

STOPPED = """import aim
run = aim.Run(repo=".", system_tracking_interval=None, log_system_params=False, capture_terminal_logs=False)
run.name = "stopped"
run["env"] = {"precision": "fp32"}
run.close()"""
"""A run that was never evaluated."""


HOSTILE = '<img src="x" onerror="window.hostile = true">'
NAMED_SO = """
import sys
from dataclasses import replace
from pathlib import Path
from dsv3.params.read import read_params
from dsv3.tracking.aim import AimTracker
from dsv3.tracking.events import Row, Text
from dsv3.tracking.identity import run_identity
text = sys.argv[1]
identity = run_identity(read_params(Path("params.yaml")), "f" * 64, {}, {}, {}, {"precision": "fp32"})
params = identity.params | {"data": identity.params["data"] | {"path": text}}
tracker = AimTracker(None)
print(tracker.open(replace(identity, name=text, params=params, changes={"data.path": text}), None, "rebuild"))
tracker.write(Row("history", {"step": 1, "loss": 4.0}))
tracker.write(Text("sample", text, 1, {"prompt": text}))
tracker.close("finished")"""
"""A run with a text of somebody's as its name, description, parameter, prompt and sample; prints its hash."""


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def need_a_browser() -> None:
    """Skip the test where something is missing that it needs."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with its driver; Debian: apt-get install chromium chromium-driver")
    pytest.importorskip("selenium", reason="a group of its own: make test-ui")
    pytest.importorskip("aim", reason="Aim has no wheels for this Python")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """A baseline in fp32, an experiment in FP8, and a run that stopped before it had any number."""
    need_a_browser()
    lab = Laboratory.at(tmp_path_factory.mktemp("laboratory"))
    lab.set_params({"train": {"max_steps": 60, "eval_steps": 6}, "sample": {"max_new_tokens": 50}})
    lab.commit("My baseline's parameters")
    lab.run("dvc", "repro")
    lab.commit("My baseline")
    lab.run("dvc", "exp", "run", "--name", "fp8", "-S", "train.use_fp8=true")
    lab.run(sys.executable, "-c", STOPPED)
    return lab


@pytest.fixture(scope="module")
def address(lab: Laboratory) -> Iterator[str]:
    """Where Aim's interface answers, started as `make ui` does."""
    with interface(lab.root, lab.environment(), free_port()) as address:
        yield address


@pytest.fixture(scope="module")
def pages(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    """A browser beside the interface, after all runs were indexed."""
    screenshots = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    with browser(address, screenshots) as pages:
        pages.wait_until_indexed(3)
        yield pages


@pytest.fixture
def names(lab: Laboratory) -> list[str]:
    """The runs' names: the experiment's, with what it changed, and the baseline's."""
    commit = lab.run("git", "rev-parse", "HEAD~1").stdout
    return ["fp8 · train.use_fp8: true", f"workspace-{commit[:7]}"]


def test_the_table_of_runs_names_them_and_says_what_differs(pages: Pages, names: list[str]):
    pages.open("/runs")
    pages.wait(lambda: len(pages.texts(".AttachedTagsList__tags")) == 2, "tags")
    assert pages.texts(".RunNameColumn__runName") == ["stopped", *names]
    tags = pages.texts(".AttachedTagsList__tags")
    assert "fp8_emulated" in tags[0] and "train.use_fp8: true" in tags[0]
    assert "fp32" in tags[1] and "use_fp8" not in tags[1]
    assert pages.errors() == []
    pages.save("aim_table")


@pytest.mark.parametrize(
    ("path", "titles", "count"),
    [("/bookmarks", "h3", len(BOOKMARKS)), ("/", ".DashboardBookmarks__list__ListItem__Text", 5)],
)
def test_the_prepared_views_are_there_when_aim_opens(pages: Pages, path: str, titles: str, count: int):
    pages.open(path)
    expected = [view.name for view in BOOKMARKS[:count]]
    pages.wait(lambda: set(expected) <= set(pages.texts(titles)), "bookmarks")
    assert [text for text in pages.texts(titles) if text in expected] == expected


@pytest.mark.parametrize("key", PATHS)
def test_a_view_draws_both_runs_and_no_error(pages: Pages, key: str):
    pages.open(PATHS[key])
    pages.wait(lambda: len(pages.attributes(MARKS[key], "1")) >= 2, key)
    assert pages.errors() == []
    pages.save(f"aim_{key if key != 'loss' else 'comparison'}")


def test_each_loss_has_a_curve_per_run_in_its_precisions_color(pages: Pages, names: list[str]):
    pages.open(PATHS["loss"])
    pages.wait(lambda: len(pages.attributes(MARKS["loss"], "1")) == 4, "curves")
    charts = pages.attributes(".LineChart", "[...element.querySelectorAll('path.Line')].map(line => line.style.stroke)")
    assert len(charts) == 2 and charts[0] == charts[1] and len(set(charts[0])) == 2
    legends = " ".join(pages.texts(".Legends text"))
    assert '"fp32"' in legends and '"fp8_emulated"' in legends
    assert all(name in legends for name in names)


def test_the_held_out_loss_is_a_number_beside_its_cost_whatever_other_runs_lack(pages: Pages):
    pages.open(PATHS["cost"])
    pages.wait(lambda: len(pages.attributes(MARKS["cost"], "1")) == 2, "points")
    ticks = pages.texts(".ScatterPlot .yAxis .tick")
    assert len(ticks) > 2 and all(re.fullmatch(r"\d[\d.]*", tick) for tick in ticks)


def test_the_runs_stand_beside_their_headline_numbers(pages: Pages, names: list[str]):
    pages.open(PATHS["runs"])
    pages.wait(lambda: len(pages.texts(".RunNameColumn__runName")) == 2, "runs")
    assert pages.texts(".RunNameColumn__runName") == names
    columns = pages.texts(".Table__pane--middle .Table__column .Table__cell--header")
    headline = ["evaluate.heldout.nats_per_char", "train.validation.loss", "train.tokens_per_s"]
    assert [name for name in columns if name in headline] == headline


def test_figures_and_samples_stand_side_by_side_under_the_runs_names(pages: Pages, names: list[str]):
    pages.open(PATHS["figures"])
    loaded = "element.complete && element.naturalWidth > 100"
    pages.wait(lambda: pages.attributes(MARKS["figures"], loaded) == [True] * 4, "figures")
    titles = " ".join(pages.texts(".MediaSet__container__path"))
    assert all(name in titles for name in names)
    pages.open(PATHS["samples"])
    pages.wait(lambda: len(pages.texts(MARKS["samples"])) == 2, "samples")
    assert all(text.startswith("ROMEO:\n") and len(text) > 30 for text in pages.texts(MARKS["samples"]))
    titles = " ".join(pages.texts(".BoxVirtualizer__container__horizontalRuler"))
    assert all(name in titles for name in names)


@pytest.fixture(scope="module")
def hostile_pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pages, str]]:
    """A browser beside the interface of a project whose one run is `NAMED_SO`, and the run's hash."""
    need_a_browser()
    lab = Laboratory.at(tmp_path_factory.mktemp("hostile"))
    run_hash = lab.run(sys.executable, "-c", NAMED_SO, HOSTILE).stdout.split()[-1]
    with (
        interface(lab.root, lab.environment(), free_port()) as address,
        browser(address, tmp_path_factory.mktemp("screenshots")) as pages,
    ):
        pages.wait_until_indexed(1)
        yield pages, run_hash


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/runs", ".RunNameColumn__runName"),
        ("/runs", ".AttachedTagsList__tags"),
        (PATHS["loss"], "body"),
        (PATHS["samples"], MARKS["samples"]),
        ("/runs/{}/overview", "body"),
        ("/runs/{}/parameters", "body"),
        ("/runs/{}/texts", "body"),
    ],
    ids=["name", "tag", "loss", "sample", "run", "parameters", "texts"],
)
def test_a_name_a_prompt_and_a_parameter_that_are_html_are_shown_as_text(
    hostile_pages: tuple[Pages, str], path: str, place: str
):
    pages, run_hash = hostile_pages
    pages.open(path.format(run_hash))
    pages.wait(lambda: any(HOSTILE in text for text in pages.texts(place)), "the text")
    time.sleep(1)  # for what is drawn last
    assert pages.attributes('img[src="x"], [onerror]', "element.outerHTML") == []
    assert pages.attributes("body", "window.hostile === undefined") == [True]

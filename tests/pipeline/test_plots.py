"""`dvc plots show` and `diff` draw every table without a network, in the colors of layers and operands."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.contracts.test_tree import TEXTS
from tests.training_inputs import ROOT

TABLES = {
    "results/train/history.tsv": "step\tloss\tgrad_norm\tlearning_rate\n10\t4\t1\t0.1\n20\t3\t1\t0.2\n",
    "results/train/validation.tsv": "step\tloss\tnats_per_char\n10\t4\t2\n20\t3\t1.5\n",
    "results/train/router.tsv": "step\tlayer\tmax_vio_batch\n10\t1\t0.5\n10\t2\t0.7\n20\t1\t0.3\n20\t2\t0.4\n",
    "results/train/fp8.tsv": "step\tmodule\toperand\trelative_error\n10\ta\tinput\t0.02\n10\ta\tgradient\t0.03\n",
    "results/evaluate/loss_by_position.tsv": "position\tloss\n0\t4\n1\t3\n",
    "results/evaluate/expert_load.tsv": "layer\texpert\tload_share\n1\t0\t0.6\n1\t1\t0.4\n2\t0\t0.5\n2\t1\t0.5\n",
}
NUM_PLOTS = len(TABLES) + 2  # and the two of several tables
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The pages of a project with these tables: of the workspace alone, and beside its last commit."""
    root = tmp_path_factory.mktemp("plots")
    shutil.copytree(ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local"))
    (root / "dvc.yaml").write_text(TEXTS["dvc.yaml"])
    for name in ("params.yaml", "mini_model/config_nano.json"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(TEXTS[name])
    for name, text in TABLES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "results/evaluate/figures").mkdir()
    Image.new("RGB", (4, 3), "red").save(root / "results/evaluate/figures/load.png")
    author = ["-c", "user.name=n", "-c", "user.email=e@x"]
    for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "m"]):
        subprocess.run(["git", *arguments], cwd=root, check=True)
    (root / "results/train/router.tsv").write_text(TABLES["results/train/router.tsv"].replace("0.5", "0.9"))
    commands = {"show": ["show"], "diff": ["diff", "HEAD"]}
    for name, words in commands.items():
        command = [sys.executable, "-m", "dvc", "plots", *words, "--out", name]
        environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return {name: root / name / "index.html" for name in commands}


def specs(page: Path) -> list[dict]:
    """What Vega is to draw."""
    return [json.loads(line) for line in re.findall(r"var spec = (\{.*\});$", page.read_text(), flags=re.MULTILINE)]


@pytest.mark.parametrize("name", ["show", "diff"])
def test_the_page_asks_no_server_for_scripts(pages, name):
    assert re.findall(r"<script[^>]+src\s*=[^>]*>", pages[name].read_text()) == []


@pytest.mark.parametrize("name", ["show", "diff"])
def test_every_table_is_on_the_page_and_layers_and_operands_have_colors(pages, name):
    found = specs(pages[name])
    assert len(found) == NUM_PLOTS
    colored = {spec["title"]["text"]: spec for spec in found if "spec" in spec}
    colors = {title: spec["spec"]["encoding"]["color"]["field"] for title, spec in colored.items()}
    assert colors == {
        "MaxVio of single batches, per layer": "layer",
        "FP8 rounding error of each operand": "operand",
        "Share of the tokens, per expert and layer": "layer",
    }
    points = colored["MaxVio of single batches, per layer"]["data"]["values"]
    assert {str(point["layer"]) for point in points} == {"1", "2"}
    assert len({point["rev"] for point in points}) == {"show": 1, "diff": 2}[name]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("name", ["show", "diff"])
def test_a_browser_without_a_network_draws_every_plot(pages, name, tmp_path):
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    options += ["--virtual-time-budget=8000", f"--user-data-dir={tmp_path}", "--dump-dom"]
    command = [str(CHROMIUM), *options, pages[name].as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("<canvas ") == NUM_PLOTS


def test_the_page_names_the_versions_and_the_licence_of_what_it_holds():
    text = (ROOT / ".dvc/plots.html").read_text(encoding="utf-8")
    versions = dict(re.findall(r"/\* (vega[a-z-]*) ([\d.]+) \*/", text))
    assert versions.keys() == {"vega", "vega-lite", "vega-embed"}
    assert all(f"{package} {version}" in text.split("-->")[0] for package, version in versions.items())
    assert "Redistributions of source code must retain" in text.split("-->")[0]

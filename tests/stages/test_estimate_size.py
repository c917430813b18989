import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.committed import PROJECT

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path):
    """A folder with the parameters and the models' configurations."""
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    shutil.copytree(PROJECT / "mini_model", tmp_path / "mini_model", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(project, *arguments, code=None):
    command = ["-c", code] if code else ["-m", "stages.estimate_size", *arguments]
    return subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def edit(project, old, new):
    path = project / "params.yaml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_it_writes_metrics_of_the_chosen_model_and_a_table_of_all_and_prints_both(project):
    edit(project, "config_nano.json   #", "config_tiny.json   #")
    result = run(project, "--output", "results/estimate_size")
    assert result.returncode == 0, result.stderr
    folder = project / "results" / "estimate_size"
    assert sorted(path.name for path in folder.iterdir()) == [
        "accepted.txt",
        "headline.json",
        "metrics.json",
        "table.json",
        "table.md",
    ]
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["parameters_total"], metrics["parameters_active"]) == (142_435_584, 103_507_200)
    rows = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert [row["config"] for row in rows] == ["config_nano.json", "config_tiny.json", "config.json"]
    for number in ("5,691,664,384", "1,350,559,744", "142,435,584", "103,507,200"):
        assert number in result.stdout
        assert number in (folder / "table.md").read_text(encoding="utf-8")


def test_the_same_parameters_give_the_same_bytes(project):
    for output in ("first", "second"):
        assert run(project, "--output", output).returncode == 0
    for name in ("metrics.json", "table.json", "table.md"):
        assert (project / "first" / name).read_bytes() == (project / "second" / name).read_bytes()


def test_it_never_imports_torch_or_transformers(project):
    code = (
        "import sys; from pathlib import Path; from stages.estimate_size import main; main(Path('out'));"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    result = run(project, code=code)
    assert result.returncode == 0, result.stderr


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(project):
    result = run(project, "--output", "out", "--dry-run")
    assert result.returncode == 0
    assert "would estimate mini_model/config_nano.json" in result.stdout
    assert not (project / "out").exists()


def test_a_training_over_the_budget_stops_the_pipeline_here_in_one_line(project):
    edit(project, "memory_budget_gib: null", "memory_budget_gib: 0.001")
    result = run(project, "--output", "out")
    assert result.returncode == 2
    assert result.stderr.startswith("estimate_size.memory_budget_gib is 0.001; training needs ")
    assert result.stderr.count("\n") == 1
    assert not (project / "out").exists()


def test_what_train_depends_on_knows_no_number_and_goes_when_a_training_is_refused(project):
    accepted = project / "out" / "accepted.txt"
    assert run(project, "--output", "out").returncode == 0
    before = accepted.read_bytes()
    edit(project, "context_tokens: 4096", "context_tokens: 8192")
    edit(project, "memory_budget_gib: null", "memory_budget_gib: 1000")
    assert run(project, "--output", "out").returncode == 0
    assert accepted.read_bytes() == before
    edit(project, "memory_budget_gib: 1000", "memory_budget_gib: 0.001")
    assert run(project, "--output", "out").returncode == 2
    assert not accepted.exists()


def test_a_mistake_in_any_section_is_one_line_and_status_2(project):
    edit(project, "top_p: 0.95", "top_p: 2")
    result = run(project, "--output", "out")
    assert (result.returncode, result.stderr) == (2, "params.yaml: sample.top_p is 2; must be <= 1\n")
    assert not (project / "out").exists()


def test_an_earlier_estimate_is_replaced(project):
    for _ in range(2):
        result = run(project, "--output", "out")
        assert result.returncode == 0, result.stderr


def test_a_table_among_others_files_is_kept(project):
    (project / "mine").mkdir()
    for name in ("table.md", "thesis.md"):
        (project / "mine" / name).write_text("precious")
    result = run(project, "--output", "mine")
    assert result.returncode == 2
    assert result.stderr.startswith("mine: holds table.md, which would be replaced, beside thesis.md")
    assert (project / "mine" / "table.md").read_text() == "precious"

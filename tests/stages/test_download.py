import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.committed import PROJECT

ROOT = Path(__file__).parents[2]
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n"


@pytest.fixture
def project(tmp_path):
    """A folder with the parameters, a text of its own, and the models' configurations."""
    parameters = (PROJECT / "params.yaml").read_text(encoding="utf-8")
    parameters = parameters.replace("source: auto", "source: file").replace("path: null", "path: my.txt", 1)
    (tmp_path / "params.yaml").write_text(parameters, encoding="utf-8")
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    shutil.copytree(PROJECT / "mini_model", tmp_path / "mini_model", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(project, *arguments, code=None):
    command = ["-c", code] if code else ["-m", "stages.download", "--output", "data/corpus", *arguments]
    return subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_writes_the_text_and_says_what_it_is(project):
    result = run(project)
    assert result.returncode == 0, result.stderr
    assert (project / "data/corpus/text.txt").read_text() == TEXT
    manifest = json.loads((project / "data/corpus/manifest.json").read_text())
    assert result.stdout.startswith(f"writes 1 file(s), {len(TEXT)} bytes, from my.txt into data/corpus\n")
    assert manifest["sha256"] in result.stdout
    assert f"{len(TEXT)} characters" in result.stdout


def test_a_dry_run_writes_nothing(project):
    result = run(project, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert f"would write 1 file(s), {len(TEXT)} bytes, from my.txt into data/corpus" in result.stdout
    assert not (project / "data").exists()


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_a_missing_file_is_one_line_and_exit_status_2(project, arguments):
    (project / "my.txt").unlink()
    result = run(project, *arguments)
    assert result.returncode == 2
    assert result.stderr == "data.path is my.txt; no such file, or no text, jsonl, json, parquet or csv in it\n"
    assert not list((project / "data").glob("*")) if (project / "data").exists() else True


def test_a_mistake_in_another_section_is_told_before_anything_is_read(project):
    parameters = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(parameters.replace("stride: 128", "stride: -1"))
    result = run(project)
    assert result.returncode == 2
    assert "evaluate.stride is -1" in result.stderr
    assert result.stderr.count("\n") == 1


def test_torch_is_never_imported(project):
    code = (
        "import sys; from pathlib import Path; from stages.download import main; main(Path('data/corpus'))\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    assert run(project, code=code).stdout.endswith("[]\n")

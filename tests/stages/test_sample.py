import shutil
from pathlib import Path

import pytest

from tests.exported_model import run_stage, set_params, write_exported


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    write_exported(folder)
    return folder


@pytest.fixture(scope="module")
def page(prepared) -> str:
    done = run_stage("sample", prepared)
    assert done.returncode == 0, done.stderr
    return (prepared / "samples.md").read_text()


def test_the_page_continues_every_prompt_and_names_its_origin(page):
    assert page.startswith("# Samples\n")
    assert "| data | made up |" in page
    assert "| seed | 1337 |" in page
    assert "## `To be`\n\n```text\nTo be" in page
    assert "## `the king`\n\n```text\nthe king\n" in page


def test_the_same_seed_writes_the_same_page(prepared, page, tmp_path):
    assert run_stage("sample", prepared, output=str(tmp_path / "again.md")).returncode == 0
    assert (tmp_path / "again.md").read_text() == page


def test_dry_run_prints_the_plan_and_writes_nothing(prepared, tmp_path):
    done = run_stage("sample", prepared, "--dry-run", output=str(tmp_path / "none.md"))
    assert done.returncode == 0, done.stderr
    assert "2 prompts, 1 continuations each, at most 8 tokens, on cpu" in done.stdout
    assert not (tmp_path / "none.md").exists()


def test_a_text_that_does_not_fit_the_model_is_told_in_one_line(prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    set_params(folder, sample={"max_new_tokens": 100})
    done = run_stage("sample", folder, output=str(tmp_path / "none.md"))
    assert done.returncode == 2
    assert "sample.max_new_tokens is 100; must be <= 58" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr

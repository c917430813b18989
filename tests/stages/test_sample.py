import contextlib
import re
import shutil
from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.tracking.events import Result
from dsv3.tracking.tracker import OpenTrackers
from stages import sample
from tests.exported_model import edit_json, run_without_home, set_params, write_exported


def run(folder: Path, output: Path, dry_run: bool = False) -> None:
    inputs = {"model": folder / "final_model", "run": folder / "run.json", "params": folder / "params.yaml"}
    with contextlib.chdir(folder):
        sample.main(**inputs, output=output, dry_run=dry_run)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    write_exported(folder)
    return folder


@pytest.fixture(scope="module")
def page(prepared) -> str:
    run(prepared, prepared / "samples.md")
    return (prepared / "samples.md").read_text()


def test_the_page_continues_every_prompt_and_names_its_origin(page):
    assert page.startswith("# Samples\n")
    assert "| data | made up |" in page
    assert "| seed | 1337 |" in page
    assert "## `To be`\n\n```text\nTo be" in page
    assert "## `the king`\n\n```text\nthe king\n" in page


def test_the_same_seed_writes_the_same_page(prepared, page, tmp_path):
    run(prepared, tmp_path / "again.md")
    assert (tmp_path / "again.md").read_text() == page


def test_a_prompt_more_does_not_change_what_follows_the_others(prepared, page, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    set_params(tmp_path / "copy", sample={"prompts": ["To be", "the king\n", "light"]})
    run(tmp_path / "copy", tmp_path / "more.md")
    assert (tmp_path / "more.md").read_text().startswith(page.rstrip("\n"))


def test_dry_run_prints_the_plan_and_writes_nothing(prepared, tmp_path, capsys):
    run(prepared, tmp_path / "none.md", dry_run=True)
    assert "2 prompts, 1 continuations each, at most 8 tokens, on cpu" in capsys.readouterr().out
    assert not (tmp_path / "none.md").exists()


def test_no_home_is_needed(prepared, page, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    inputs = ["--model", "final_model", "--run", "run.json", "--output", "again.md"]
    done = run_without_home("sample", tmp_path / "copy", *inputs)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy" / "again.md").read_text() == page


def test_a_file_that_is_no_page_of_samples_is_refused_first_and_kept(prepared, tmp_path):
    (tmp_path / "thesis.md").write_text("# Thesis")
    for dry_run in (False, True):
        with pytest.raises(UserError, match=r"thesis\.md: is no page of samples and would be lost; name another file"):
            run(prepared, tmp_path / "thesis.md", dry_run)
    assert (tmp_path / "thesis.md").read_text() == "# Thesis"


def test_an_earlier_page_is_replaced(prepared, page, tmp_path):
    (tmp_path / "page.md").write_text(page.replace("king", "queen"))
    run(prepared, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == page


def test_a_text_that_does_not_fit_the_model_is_told(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    set_params(tmp_path / "copy", sample={"max_new_tokens": 60})
    with pytest.raises(UserError, match=r"sample\.max_new_tokens is 60; must be <= 54"):
        run(tmp_path / "copy", tmp_path / "none.md")
    assert not (tmp_path / "none.md").exists()


def test_speculation_changes_the_greedy_page_by_one_line_and_says_how_the_drafts_fared(
    prepared, tmp_path, capsys, monkeypatch
):
    shown = []
    monkeypatch.setattr(OpenTrackers, "write", lambda self, event: shown.append(event))
    shutil.copytree(prepared, tmp_path / "copy")
    pages = []
    for is_speculative in (False, True):
        set_params(tmp_path / "copy", sample={"do_sample": False, "speculative": is_speculative})
        run(tmp_path / "copy", tmp_path / "page.md")
        pages.append((tmp_path / "page.md").read_text().splitlines())
    (line,) = [line for line in pages[1] if line not in pages[0]]
    assert [other for other in pages[1] if other != line] == pages[0]
    fared = re.fullmatch(r"\| speculation \| (.* drafts accepted .*, \d\.\d\d tokens per forward pass) \|", line)
    assert fared
    assert fared[1] in capsys.readouterr().out
    (result,) = [event for event in shown if isinstance(event, Result)]  # none without speculation
    assert (result.stage, list(result.metrics), result.step) == ("sample", ["draft_acceptance", "tokens_per_pass"], 12)


def test_speculation_without_prediction_modules_is_refused_in_the_first_second(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    config = {"config": str(tmp_path / "copy" / "config.json")}
    set_params(tmp_path / "copy", model=config, sample={"speculative": True})
    edit_json(tmp_path / "copy" / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(UserError, match=r"sample\.speculative is true; needs a model with MTP modules"):
        run(tmp_path / "copy", tmp_path / "none.md", dry_run=True)

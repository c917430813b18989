import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.data.corpus import Origin, write_manifest, write_single_text
from tests.committed import PROJECT

ROOT = Path(__file__).parents[2]
TEXT = "".join(f"Citizen {number % 17}:\nSpeak, friend, speak {number}!\n\n" for number in range(200))


@pytest.fixture
def project(tmp_path):
    """A folder with the parameters, a corpus, and the models' configurations."""
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    shutil.copytree(PROJECT / "mini_model", tmp_path / "mini_model", ignore=shutil.ignore_patterns("__pycache__"))
    corpus = tmp_path / "data" / "corpus"
    corpus.mkdir(parents=True)
    write_manifest(corpus, "file", Origin("file", {}), write_single_text(corpus, [TEXT.encode()], "text"))
    return tmp_path


def run(project, *arguments, code=None):
    options = ["--corpus", "data/corpus", "--output", "data/tokens", "--metrics", "results/metrics.json"]
    command = ["-c", code] if code else ["-m", "stages.tokenize", *options, *arguments]
    return subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_writes_tokens_and_metrics_and_sums_them_up(project):
    result = run(project)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((project / "results/metrics.json").read_text())
    meta = json.loads((project / "data/tokens/meta.json").read_text())
    assert metrics["round_trip_exact"] is True
    assert meta["splits"]["test"]["tokens"] == metrics["test"]["tokens"]
    assert f"{metrics['train']['tokens']:,} tokens" in result.stdout
    assert "decoded again exactly" in result.stdout


def test_a_log_gets_a_line_of_progress_and_a_program_objects(project):
    total = 4 * len(TEXT)  # read for the tokenizer and for each split
    plain, quiet, program = (run(project, *options) for options in ((), ("--quiet",), ("--progress", "json")))
    assert plain.stderr == f"tokenize: character {total:,} of {total:,}, 00:00 left, now encoding test\n"
    assert (quiet.stderr, program.stderr) == ("", "")
    assert quiet.stdout == plain.stdout
    objects = program.stdout.removesuffix(plain.stdout).splitlines()
    states = [json.loads(line) for line in objects]
    assert [state["done"] for state in states] == [len(TEXT) * passes for passes in range(1, 5)]
    assert {state["total"] for state in states} == {total}
    assert [state["now"] for state in states] == [
        "training the tokenizer",
        *(f"encoding {split}" for split in ("train", "validation", "test")),
    ]


def test_a_dry_run_writes_nothing(project):
    result = run(project, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"would write {len(TEXT):,} characters of file, split by characters")
    assert {path.name for path in (project / "data").iterdir()} == {"corpus"}
    assert not (project / "results").exists()


def test_metrics_replace_those_of_an_earlier_run_and_no_other_file(project):
    assert run(project).returncode == 0
    assert run(project).returncode == 0
    for name in ("params.yaml", "data/tokens/meta.json"):
        before = (project / name).read_bytes()
        result = run(project, "--metrics", name)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"{name}: is no metrics.json of tokenize and would be lost; name another file\n"
        assert (project / name).read_bytes() == before


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_a_missing_corpus_is_one_line_and_exit_status_2(project, arguments):
    shutil.rmtree(project / "data")
    result = run(project, *arguments)
    assert result.returncode == 2
    assert "data/corpus/manifest.json: can't be read" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (project / "results").exists()


def test_a_pretrained_tokenizer_larger_than_the_model_is_one_line_and_writes_nothing(project):
    assert run(project).returncode == 0
    shutil.move(project / "data/tokens/tokenizer", project / "pretrained")
    shutil.rmtree(project / "data/tokens")
    shutil.rmtree(project / "results")
    config = json.loads((project / "mini_model/config_nano.json").read_text()) | {"vocab_size": 270}
    (project / "small.json").write_text(json.dumps(config))
    parameters = (project / "params.yaml").read_text().replace("mini_model/config_nano.json ", "small.json ", 1)
    (project / "params.yaml").write_text(parameters.replace("tokenizer: byte_level_bpe", "tokenizer: pretrained"))
    result = run(project)
    assert result.returncode == 2
    assert "must be <= 270, the model's vocab_size" in result.stderr
    assert result.stderr.count("\n") == 1
    assert {path.name for path in (project / "data").iterdir()} == {"corpus"}
    assert not (project / "results").exists()


def test_torch_is_never_imported(project):
    code = (
        "import sys; from pathlib import Path; from stages.tokenize import main\n"
        "main(Path('data/corpus'), Path('data/tokens'), Path('metrics.json'))\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    assert run(project, code=code).stdout.endswith("[]\n")

"""The results that are committed are those that README tells of, and of the parameters that are committed beside them.

They are the baseline that `dvc metrics diff` and `dvc exp show` compare with. Of which code they are, dvc.lock and the
README say; a refactoring does not make them false.

Judged is the last commit, or, where README is about to change, the next one: `dvc repro` writes results, puts dvc.lock
into the index, and is no reason to fail. Nor is a baseline of your own: only `make check`, and with it every commit to
this project, asks.
"""

import json
import math
from typing import Any

import pytest
from ruamel.yaml import YAML

from dsv3.params.architecture import Architecture
from dsv3.sizing.parameters import num_active_parameters, num_parameters
from tests.committed import committed_text, git

pytestmark = pytest.mark.baseline

REVISION = "" if git("diff", "--cached", "--name-only", "--", "README.md") else "HEAD"
README = committed_text("README.md", REVISION)
PIPELINE = YAML(typ="safe").load(committed_text("dvc.yaml", REVISION))["stages"]


def headline(stage: str) -> dict[str, Any]:
    """The committed metrics of a stage."""
    return json.loads(committed_text(f"results/{stage}/headline.json", REVISION))


def last_row(table: str) -> dict[str, str]:
    """The last row of a committed table of the training."""
    header, *rows = committed_text(f"results/train/{table}.tsv", REVISION).splitlines()
    return dict(zip(header.split("\t"), rows[-1].split("\t"), strict=True))


@pytest.mark.parametrize("stage", PIPELINE)
def test_the_baseline_was_made_with_the_parameters_that_are_committed(stage: str):
    params = YAML(typ="safe").load(committed_text("params.yaml", REVISION))
    lock = YAML(typ="safe").load(committed_text("dvc.lock", REVISION))["stages"]
    assert stage in lock, f"dvc.lock has no stage {stage}: dvc repro {stage}, then commit dvc.lock and results/"
    locked = lock[stage].get("params", {}).get("params.yaml", {})
    assert locked == {section: params[section] for section in PIPELINE[stage].get("params", [])}


def test_the_readmes_results_are_the_committed_ones():
    train, evaluate, size = headline("train"), headline("evaluate"), headline("estimate_size")
    nano = Architecture.model_validate_json(committed_text("mini_model/config_nano.json", REVISION))
    end = last_row("history")
    told = [
        f"({train['tokens_s']:,} tokens/s, median)",
        f"{size['parameters']:,} parameters, {num_active_parameters(nano):,} active per token",
        f"{int(end['tokens_seen']):,} tokens, {float(end['epoch']):.0f} epochs",
        f"**{evaluate['heldout']:.4f} nats/char**, {evaluate['heldout'] / math.log(2):.4f} bits/byte",  # of ASCII
        f"MaxVio {evaluate['max_vio']:.2f} in the worst layer, {evaluate['dead_experts'] or 'no'} dead expert",
    ]
    assert [words for words in told if words not in README] == []


@pytest.mark.parametrize("name", ["config_nano.json", "config_tiny.json", "config.json"])
def test_the_readme_states_the_models_true_sizes(name: str):
    architecture = Architecture.model_validate_json(committed_text(f"mini_model/{name}", REVISION))
    rows = [line.split("|")[1:-1] for line in README.splitlines() if line.startswith("|")]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 4}
    column = [cell.startswith(f"[{name}]") for cell in table[""]].index(True)
    assert table["parameters"][column] == f"{num_parameters(architecture):,}"
    assert table["active per token"][column] == f"{num_active_parameters(architecture):,}"
    assert table["vocabulary"][column] == f"{architecture.vocab_size:,}"
    assert table["longest context"][column] == f"{architecture.max_position_embeddings:,}"

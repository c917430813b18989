"""The results that are committed are those that README tells of, and of the parameters that are committed beside them.

They are the baseline that `dvc metrics diff` and `dvc exp show` compare with. Of which code they are, dvc.lock and the
README say; a refactoring does not make them false.
"""

import json
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.contracts.import_closure import ROOT
from tests.contracts.test_tree import TEXTS

PARAMS = YAML(typ="safe").load(TEXTS["params.yaml"])
LOCKED = YAML(typ="safe").load((ROOT / "dvc.lock").read_text(encoding="utf-8"))["stages"]
STAGES = YAML(typ="safe").load(TEXTS["dvc.yaml"])["stages"]


def metrics(stage: str) -> dict[str, Any]:
    """The committed results of a stage."""
    return json.loads((ROOT / "results" / stage / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_baseline_was_made_with_the_parameters_that_are_committed(stage: str):
    locked = LOCKED[stage].get("params", {}).get("params.yaml", {})
    assert locked == {section: PARAMS[section] for section in STAGES[stage].get("params", [])}


def test_the_readmes_results_are_the_committed_ones():
    train, evaluate, size = metrics("train"), metrics("evaluate"), metrics("estimate_size")
    heldout, router = evaluate["heldout"], evaluate["router"]
    told = [
        f"({train['tokens_per_s']:,.0f} tokens/s, median)",
        f"{size['parameters_total']:,} parameters, {size['parameters_active']:,} active per token",
        f"{train['tokens_seen']:,} tokens, {train['epoch']:.0f} epochs",
        f"**{heldout['nats_per_char']:.4f} nats/char**, {heldout['bits_per_byte']:.4f} bits/byte",
        f"MaxVio {router['max_vio_global_max']:.2f} in the worst layer, {router['dead_experts'] or 'no'} dead expert",
    ]
    assert [words for words in told if words not in TEXTS["README.md"]] == []

"""A model whose router is not DeepSeek-V3's: nobody computes it as one, and its own code does."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from dsv3.errors import UserError
from dsv3.export.fp8 import export_fp8
from dsv3.export.gguf.write import export_gguf
from dsv3.export.huggingface import export_huggingface
from dsv3.export.loading import load_model, load_tokenizer
from dsv3.params.architecture import read_architecture
from dsv3.training.model import build_model
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import SCORING
from mini_model.validation_deepseek import VARIANTS
from tests.training_inputs import MICRO, write_inputs

OTHERS = {"scoring_func": "made_up", "topk_method": "made_up", "moe_layer_freq": 2}
PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert model.config.scoring_func == "made_up" and "model_type" not in vars(model.config)
assert torch.equal(model(input_ids=torch.arange(20)[None]).logits, torch.load(sys.argv[2]))
model.save_pretrained(sys.argv[3])
"""


@pytest.fixture(autouse=True)
def variants(monkeypatch):
    for name, value in OTHERS.items():
        monkeypatch.setitem(VARIANTS, name, (*VARIANTS[name], value))
    monkeypatch.setitem(SCORING, "made_up", lambda logits: logits.softmax(dim=-1))


def exported(folder, **fields):
    """Export a model with these fields; return the folder."""
    write_inputs(folder, architecture={"initializer_range": 0.2, **fields})
    model = build_model(folder / "config.json", seed=3)
    export_huggingface(model, model.state_dict(), folder / "tokens", folder / "final_model", "A card\n")
    torch.save(model(input_ids=torch.arange(20)[None]).logits.detach(), folder / "logits.pt")
    return folder / "final_model"


def test_every_variant_of_the_table_is_asked_for():
    assert set(OTHERS) == set(VARIANTS)


@pytest.mark.parametrize(("name", "value"), OTHERS.items())
def test_a_variant_is_no_deepseek_v3_to_others_and_is_exported_in_no_form_of_theirs(tmp_path, name, value):
    model = exported(tmp_path, **{name: value})
    assert json.loads((model / "config.json").read_text())["model_type"] == "deepseek_v3_variant"
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
    (model / "config.json").write_text(
        (model / "config.json").read_text().replace("deepseek_v3_variant", "deepseek_v3")
    )
    for export in (lambda: export_gguf(model, tmp_path / "out", "f32"), lambda: export_fp8(model, tmp_path / "out")):
        with pytest.raises(UserError, match=rf"^{model}/config.json: {name} is {value!r}; must be .*trust_remote_code"):
            export()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value"), OTHERS.items())
def test_a_variants_configuration_is_read_again(tmp_path, name, value):
    DeepseekV3Config(**{**MICRO, name: value}).save_pretrained(tmp_path)
    assert read_architecture(tmp_path / "config.json").model_dump()[name] == value
    assert getattr(DeepseekV3Config.from_pretrained(tmp_path), name) == value


def test_its_card_claims_no_other_code_for_it(tmp_path):
    (tmp_path / "variant").mkdir()
    (tmp_path / "published").mkdir()
    card = (exported(tmp_path / "variant", scoring_func="made_up") / "README.md").read_text()
    assert "`scoring_func` is `made_up`. Only the code in this folder computes it" in card
    assert "logits are the same" not in card
    assert "logits are the same" in (exported(tmp_path / "published") / "README.md").read_text()


def test_this_project_and_the_code_beside_it_compute_it(tmp_path):
    model = exported(tmp_path, scoring_func="made_up")
    expected = torch.load(tmp_path / "logits.pt")
    assert torch.equal(load_model(model, torch.device("cpu"))(input_ids=torch.arange(20)[None]).logits, expected)
    assert load_tokenizer(model)("the king").input_ids

    # The rows that the recipe's follower would have added, behind the tables.
    rows = {
        "modeling_deepseek.py": 'SCORING["made_up"] = lambda x: x.softmax(-1)',
        "validation_deepseek.py": 'VARIANTS["scoring_func"] = (*VARIANTS["scoring_func"], "made_up")',
    }
    for name, row in rows.items():
        with (model / name).open("a", encoding="utf-8") as file:
            file.write(f"\n{row}\n")
    again = tmp_path / "again"
    words = [sys.executable, "-c", PROGRAM, model, tmp_path / "logits.pt", again]
    done = subprocess.run(list(map(str, words)), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((again / "config.json").read_text())["model_type"] == "deepseek_v3_variant"

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3.errors import UserError
from dsv3.export.loading import load_model, load_tokenizer
from dsv3.export.source import check_source
from dsv3.kernels import cpu_attention
from tests.damage import DAMAGES
from tests.exported_model import broken, edit_json, renamed, transposed, without, write_exported

CPU = torch.device("cpu")
FILES = (
    "config.json",
    "configuration_deepseek.py",
    "generation_config.json",
    "model.safetensors",
    "modeling_deepseek.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "validation_deepseek.py",
)
EVIL = "from pathlib import Path\nPath({path!r}).write_text('ran')\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    write_exported(folder)
    return folder / "final_model"


@pytest.fixture
def model(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "final_model")


def assert_refused(folder, match="."):
    for read in (lambda: (load_model(folder, CPU), load_tokenizer(folder)), lambda: check_source(folder)):
        with pytest.raises(UserError, match=match) as told:
            read()
        assert "\n" not in str(told.value)


def test_the_list_of_files_is_complete(exported):
    listed = {line.split("  ")[1] for line in (exported / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(FILES)
    assert {path.name for path in exported.iterdir()} == {*FILES, "README.md", "SHA256SUMS"}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_any_file_is_told_in_one_line(model, file, damage):
    DAMAGES[damage](model / file)
    assert_refused(model)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "foreign", "pipe"])
def test_a_damaged_list_of_digests_is_told_in_one_line(model, damage):
    DAMAGES[damage](model / "SHA256SUMS")
    assert_refused(model, "SHA256SUMS")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: without(tensors, "model.norm"), "model.norm.weight missing"),
        (
            lambda tensors: without(tensors, "experts.3.up"),
            "model.layers.1.mlp.experts.3.up_proj.weight and 1 more missing",
        ),
        (lambda tensors: without(tensors, "layers.2.eh_proj"), "model.layers.2.eh_proj.weight missing"),
        (lambda tensors: renamed(tensors, "layers.2.enorm", "layers.2.inorm"), "layers.2.enorm.weight missing"),
        (lambda tensors: {**tensors, "model.layers.2.x": torch.ones(1)}, "model.layers.2.x not of this model"),
        (lambda tensors: {**tensors, "extra": torch.ones(1)}, "extra not of this model"),
        (lambda tensors: transposed(tensors, "kv_b_proj"), "kv_b_proj.weight and 2 more of another shape"),
        (lambda tensors: {**tensors, "model.norm.weight": torch.full((32,), torch.nan)}, "model.norm.weight holds a"),
        (lambda tensors: {**tensors, "model.norm.weight": torch.ones(32).long()}, "model.norm.weight is I64"),
    ],
)
def test_weights_that_are_not_the_configurations_are_told_in_one_line(exported, tmp_path, change, message):
    assert_refused(broken(exported, tmp_path / "broken", change), message)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 10**9},
        {"num_nextn_predict_layers": 0},
        {"num_nextn_predict_layers": 2},
        {"n_routed_experts": 8},
        {"hidden_size": 64},
        {"hidden_size": "32"},
        {"hidden_size": 32.5},
        {"rms_norm_eps": "small"},
        {"tie_word_embeddings": True},
        {"model_type": "kimi_k2"},
        {"auto_map": {"AutoModelForCausalLM": "evil/repo--modeling_deepseek.DeepseekV3ForCausalLM"}},
        {"auto_map": {"AutoConfig": "elsewhere.DeepseekV3Config"}},
        {"auto_map": ["AutoConfig"]},
    ],
)
def test_a_configuration_that_is_not_the_weights_is_told_in_one_line(model, change):
    (model / "SHA256SUMS").unlink()
    edit_json(model / "config.json", **change)
    assert_refused(model, "config.json")


def test_code_and_pickles_in_the_folder_are_never_run_and_other_code_is_told(model, tmp_path, capsys):
    evil = EVIL.format(path=str(tmp_path / "proof"))
    (model / "SHA256SUMS").unlink()
    for name in ("modeling_deepseek.py", "configuration_deepseek.py", "tokenization_evil.py"):
        (model / name).write_text(evil)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(evil)
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch proof'\ntR.")
    assert load_model(model, CPU).config._attn_implementation == cpu_attention.NAME
    assert capsys.readouterr().out == (
        f"{model}: configuration_deepseek.py, modeling_deepseek.py differs from mini_model, whose code is used\n"
    )
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    load_tokenizer(model)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("reach", ["''.__class__.__mro__[1].__subclasses__()", "cycler.__init__.__globals__.os"])
def test_a_template_in_the_tokenizer_is_not_rendered_and_could_not_reach_python(model, tmp_path, reach):
    (model / "SHA256SUMS").unlink()
    (model / "chat_template.jinja").write_text(f"{{{{ {reach}.system('touch {tmp_path}/proof') }}}}")
    tokenizer = load_tokenizer(model)
    assert tokenizer.decode(tokenizer.encode("the king")) == "the king"
    with pytest.raises(Exception, match="is unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not (tmp_path / "proof").exists()


def test_the_shipped_code_is_this_checkouts_and_nothing_is_told(exported, capsys):
    load_model(exported, CPU)
    assert capsys.readouterr().out == ""


def test_pickles_alone_are_no_model(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert_refused(model, "safetensors")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "fifo"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_what_is_no_file_is_not_read(model, name, make):
    (model / name).unlink()
    make(model / name)
    assert_refused(model)


def test_a_second_file_of_weights_is_refused(model):
    save_file({"x": torch.ones(1)}, model / "other.safetensors")
    assert_refused(model, "other.safetensors: no part of the model")


def test_a_folder_without_code_and_digests_loads(model):
    for path in (*model.glob("*.py"), model / "SHA256SUMS"):
        path.unlink()
    config = json.loads((model / "config.json").read_text())
    del config["auto_map"]
    (model / "config.json").write_text(json.dumps(config))
    stored = load_file(model / "model.safetensors")
    assert torch.equal(load_model(model, CPU).state_dict()["model.norm.weight"], stored["model.norm.weight"])

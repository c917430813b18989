import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsv3.errors import UserError
from dsv3.export.huggingface import add_missing_fields, export_huggingface, padding_token
from dsv3.export.model_card import model_card
from dsv3.training.model import build_model
from tests.training_inputs import write_inputs

FACTS = {"configuration": "config.json", "commit": "0123abc"}
SCORES = {"loss": 3.5, "perplexity": 33.1, "nats_per_char": 1.5}
CARD = model_card(FACTS, SCORES, {"source": "file"})

PROGRAM = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, trust = sys.argv[1], sys.argv[2] == "trusted"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
prompt = tokenizer("the king", return_tensors="pt")
output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
print(type(model).__module__.split(".")[0], tokenizer.decode(output[0])[:8], output[0].tolist())
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write_inputs(folder, architecture={"initializer_range": 0.2})
    model = build_model(folder / "config.json", seed=3)
    for _, router in model.routers():
        router.e_score_correction_bias.uniform_(-0.1, 0.1)
    export_huggingface(model, model.state_dict(), folder / "tokens", folder / "final_model", CARD)
    torch.save(model(input_ids=torch.arange(20)[None]).logits.detach(), folder / "logits.pt")
    return folder


def test_a_seed_gives_the_same_weights_again_and_another_seed_others(tmp_path):
    write_inputs(tmp_path)
    first, again, other = (build_model(tmp_path / "config.json", seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_an_architecture_that_cannot_be_built_is_refused_in_one_line(tmp_path):
    write_inputs(tmp_path, architecture={"n_group": 3})
    with pytest.raises(UserError, match=r"config.json: .*n_group is 3; must divide"):
        build_model(tmp_path / "config.json", seed=0)


def test_the_folder_holds_all_that_loading_it_needs(exported, tmp_path):
    """And nothing else that lies beside the tokenizer: an editor's lock, a pipe."""
    tokens = shutil.copytree(exported / "tokens", tmp_path / "tokens")
    (tokens / "tokenizer" / ".#tokenizer.json").symlink_to("nowhere")
    os.mkfifo(tokens / "tokenizer" / "pipe")
    model = build_model(exported / "config.json", seed=3)
    export_huggingface(model, model.state_dict(), tokens, tmp_path / "beside", CARD)
    assert {path.name for path in (tmp_path / "beside").iterdir()} == {
        path.name for path in (exported / "final_model").iterdir()
    }
    names = {path.name for path in (exported / "final_model").iterdir()}
    assert names == {
        "README.md",
        "SHA256SUMS",
        "config.json",
        "configuration_deepseek.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_deepseek.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "validation_deepseek.py",
    }
    config = json.loads((exported / "final_model" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_deepseek.DeepseekV3ForCausalLM"
    assert "0123abc" in (exported / "final_model" / "README.md").read_text()


def test_what_is_loaded_computes_what_was_exported(exported):
    loaded = AutoModelForCausalLM.from_pretrained(exported / "final_model", trust_remote_code=True)
    logits = loaded(input_ids=torch.arange(20)[None]).logits
    assert torch.equal(logits, torch.load(exported / "logits.pt"))


def test_equal_trainings_export_equal_folders(exported, tmp_path):
    model = build_model(exported / "config.json", seed=3)
    model.load_state_dict(
        AutoModelForCausalLM.from_pretrained(exported / "final_model", trust_remote_code=True).state_dict()
    )
    export_huggingface(model, model.state_dict(), exported / "tokens", tmp_path / "again", CARD)
    for path in (exported / "final_model").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_it_generates_elsewhere_with_and_without_the_code_beside_it(exported, tmp_path):
    outputs = {}
    for trust in ("trusted", "stock"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(exported / "final_model"), trust],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        outputs[trust] = done.stdout.split(" ", 1)
    assert outputs["trusted"][0] == "transformers_modules"
    assert outputs["stock"][0] == "transformers"
    assert outputs["trusted"][1] == outputs["stock"][1]
    assert outputs["stock"][1].startswith("the king")


def test_the_tokenizer_gives_the_text_back(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported / "final_model")
    assert tokenizer.decode(tokenizer.encode("what light!")) == "what light!"


def test_a_batch_of_prompts_is_padded_and_continued_as_each_prompt_alone(exported):
    folder = exported / "final_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompts = ["what light!", "a"]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id

    def written(texts):
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        tokens = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        return tokens[:, inputs.input_ids.shape[1] :].tolist()

    assert written(prompts) == [written([prompt])[0] for prompt in prompts]


def test_a_padding_token_that_the_tokenizer_names_is_kept(exported):
    for stated in ("k", {"__type": "AddedToken", "content": "k"}):
        folder = exported / "other"
        shutil.copytree(exported / "tokens" / "tokenizer", folder, dirs_exist_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": stated}))
        token, token_id = padding_token(folder, 0)
        assert token == "k"
        assert token_id == AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("k")
        add_missing_fields(folder / "tokenizer_config.json", {"pad_token": "x"})
        assert json.loads((folder / "tokenizer_config.json").read_text())["pad_token"] == stated

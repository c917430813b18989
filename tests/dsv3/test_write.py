import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3 import write
from dsv3.errors import UserError
from dsv3.export.loading import load_model, load_tokenizer
from dsv3.generation.sampling import sample
from dsv3.params.read import read_params
from tests.exported_model import edit_json, set_params, write_exported
from tests.training_inputs import ROOT

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with one MTP module, and parameters that ask for 8 tokens."""
    folder = tmp_path_factory.mktemp("write")
    write_exported(folder)
    return folder


def written(folder: Path, capsys, **options) -> tuple[str, str]:
    """What the command writes to standard output and to standard error, transformers' bar left out."""
    capsys.readouterr()
    with contextlib.chdir(folder):
        write.main(Path("final_model"), **options)
    captured = capsys.readouterr()
    return captured.out, "".join(line for line in captured.err.splitlines() if "Loading weights" not in line)


def sampled(folder: Path, prompt: str, seed: int, **changes) -> str:
    """What the sample stage writes behind a prompt."""
    settings = read_params(folder / "params.yaml").sample.model_copy(update=changes)
    model, tokenizer = load_model(folder / "final_model", torch.device("cpu")), load_tokenizer(folder / "final_model")
    return sample(model, tokenizer, prompt, settings, seed).continuations[0].rstrip("\ufffd")


def test_without_options_it_writes_what_the_sample_stage_does(folder, capsys):
    assert written(folder, capsys, prompt="To be") == (sampled(folder, "To be", 1337) + "\n", "")


def test_options_win_over_params_yaml_and_the_seed_decides(folder, capsys):
    options = {"max_new_tokens": 20, "temperature": 2.0, "top_k": 50, "top_p": 0.5, "seed": 3}
    text, _ = written(folder, capsys, prompt="To be", **options)
    expected = sampled(folder, "To be", **options)
    assert text == expected + "\n"
    assert written(folder, capsys, prompt="To be", **options)[0] == text
    assert written(folder, capsys, prompt="To be", **{**options, "seed": 4})[0] != text


def test_greedy_text_is_drafted_by_mtp_modules_and_is_the_same(folder, capsys):
    text, told = written(folder, capsys, prompt="To be", greedy=True)
    assert text == sampled(folder, "To be", 0, do_sample=False) + "\n"
    assert "drafts accepted" in told


def test_greedy_text_of_a_model_without_mtp_modules_is_not_drafted(tmp_path, capsys):
    write_exported(tmp_path, architecture={"num_nextn_predict_layers": 0})
    text, told = written(tmp_path, capsys, prompt="To be", greedy=True)
    assert (text, told) == (sampled(tmp_path, "To be", 0, do_sample=False) + "\n", "")


def test_an_option_of_sampling_samples_whatever_params_yaml_says(folder, capsys, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    set_params(tmp_path / "copy", sample={"do_sample": False})
    expected = sampled(folder, "To be", 1337, temperature=5.0)
    assert written(tmp_path / "copy", capsys, prompt="To be", temperature=5.0)[0] == expected + "\n"


def test_prompts_of_a_pipe_are_continued_one_by_one_as_the_sample_stage_does(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the king\n\nlight"))
    text, _ = written(folder, capsys, prompt="To be", interactive=True)
    expected = [sampled(folder, prompt, 1337 + n) for n, prompt in enumerate(["To be", "the king", "light"])]
    assert text == "".join(f"{each}\n" for each in expected)


def test_a_chat_template_is_applied_on_request_alone_and_keeps_the_conversation(folder, capsys, monkeypatch, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    model = tmp_path / "copy" / "final_model"
    (model / "chat_template.jinja").write_text(TEMPLATE)
    assert written(tmp_path / "copy", capsys, prompt="To")[0] == sampled(folder, "To", 1337) + "\n"
    seen: list[str] = []
    tokenizer = load_tokenizer(model)
    fits = write.check_fits
    monkeypatch.setattr(write, "check_fits", lambda ids, *rest: (seen.append(tokenizer.decode(ids)), fits(ids, *rest)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("be\n"))
    text, _ = written(tmp_path / "copy", capsys, prompt="To", chat=True, interactive=True, max_new_tokens=2)
    first, second = seen
    assert first == "<user>To\n<assistant>"
    assert second == f"{first}{text.splitlines()[0]}\n<user>be\n<assistant>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--prompt is missing; state one, or --interactive"),
        ({"prompt": "a", "temperature": -1.0}, r"--temperature is -1\.0; must be >= 0\.01$"),
        ({"prompt": "a", "top_p": 1.5}, r"--top-p is 1\.5; must be <= 1$"),
        ({"prompt": "a", "top_k": -1}, "--top-k is -1; must be >= 0$"),
        ({"prompt": "a", "max_new_tokens": 0}, "--max-new-tokens is 0; must be >= 1$"),
        ({"prompt": "a", "seed": -1}, "--seed is -1; must be >= 0$"),
        ({"prompt": "a", "greedy": True, "top_k": 3}, "--top-k has no effect with --greedy"),
        ({"prompt": "a" * 9, "max_new_tokens": 55}, "--max-new-tokens is 55; must be <= 54, which a prompt of 10 "),
        ({"prompt": "a" * 63}, "the prompt has 64 tokens; must be < 64, the model's positions"),
        ({"prompt": "a", "chat": True}, "--chat: the tokenizer in final_model has no chat template"),
        ({"prompt": "a\udcff"}, "--prompt: is not UTF-8"),
    ],
)
def test_a_mistake_is_told_in_one_line(folder, capsys, options, message):
    with pytest.raises(UserError, match=message) as told:
        written(folder, capsys, **options)
    assert "\n" not in str(told.value)


def test_a_template_that_cannot_be_applied_is_told_in_one_line(folder, capsys, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "final_model" / "chat_template.jinja").write_text("{{ raise_exception('one turn only') }}")
    with pytest.raises(UserError, match=r"--chat: the chat template can't be applied \(one turn only\)"):
        written(tmp_path / "copy", capsys, prompt="a", chat=True)


def test_a_damaged_model_writes_nothing(folder, capsys, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "final_model" / "SHA256SUMS").unlink()
    edit_json(tmp_path / "copy" / "final_model" / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"config\.json do not match"):
        written(tmp_path / "copy", capsys, prompt="a")


def command(folder: Path, *arguments: str, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    arguments = (*arguments, "--params", "params.yaml")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "dsv3.write", *arguments]
    return subprocess.run(line, cwd=folder, env=environment, input=text, capture_output=True, timeout=100, check=False)


def test_the_command_writes_the_text_alone_to_standard_output(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    model = tmp_path / "copy" / "final_model"
    (model / "SHA256SUMS").unlink()
    (model / "modeling_deepseek.py").write_text("")
    done = command(tmp_path / "copy", "final_model", "--interactive", "--seed", "5", text=b"To be\n\xff\n")
    assert done.returncode == 2
    assert done.stdout.decode() == sampled(folder, "To be", 5) + "\n"
    differs, mistake = done.stderr.decode().splitlines()
    assert differs.endswith("differs from mini_model, whose code is used")
    assert mistake == "standard input: is not UTF-8; convert it"


def test_a_folder_that_is_missing_is_told_in_one_line(folder):
    done = command(folder, "nowhere", "--prompt", "a")
    assert (done.returncode, done.stderr.decode()) == (2, "nowhere: holds no config.json; run dvc repro train\n")


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['dsv3.write', '--help']\n"
        "try:\n"
        "    runpy.run_module('dsv3.write', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

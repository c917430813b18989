import contextlib
import io
import subprocess
import sys

import pytest
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from dsv3.artifacts import read_json, write_json
from dsv3.cli import run_app
from dsv3.data.tokenizer import save_trained, train_tokenizer
from dsv3.errors import UserError
from dsv3.export.__main__ import app
from dsv3.export.loading import check_model
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.training_inputs import MICRO, ROOT


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    save_trained(train_tokenizer(["to be or not to be " * 9], 262), folder)
    DeepseekV3ForCausalLM(DeepseekV3Config(**MICRO)).save_pretrained(folder)
    return folder


def run_process(*arguments):
    command = [sys.executable, "-m", "dsv3.export", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def run(*arguments):
    """Run the command in this process, which has imported torch."""
    command, out, err = ["dsv3.export", *map(str, arguments)], io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as changed,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        changed.setattr(sys, "argv", command)
        run_app(app)
    return subprocess.CompletedProcess(command, end.value.code or 0, out.getvalue(), err.getvalue())


def modes(folder):
    return {path.stat().st_mode for path in folder.iterdir()}


def mode_of_a_new_file(folder):
    (folder / "new").touch()
    return (folder / "new").stat().st_mode


def assert_refused(done, message):
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_gguf_writes_one_file_and_says_what_is_left_out(model, tmp_path):
    done = run_process("gguf", model, tmp_path / "out" / "model.gguf", "--dtype", "bf16")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("model.gguf: 2 layers, matrices in bf16, without its MTP modules (1)\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    assert modes(tmp_path / "out") == {mode_of_a_new_file(tmp_path)}
    assert GGUFReader(tmp_path / "out" / "model.gguf").fields["general.architecture"].contents() == "deepseek2"


def test_fp8_writes_a_folder(model, tmp_path):
    done = run_process("fp8", model, tmp_path / "fp8")
    assert (done.returncode, done.stderr) == (0, "")
    assert modes(tmp_path / "fp8") == {mode_of_a_new_file(tmp_path)}
    assert read_json(tmp_path / "fp8" / "config.json")["quantization_config"]["quant_method"] == "fp8"


def test_fp8_writes_scales_that_are_powers_of_two_where_asked(model, tmp_path):
    done = run("fp8", model, tmp_path / "fp8", "--power-of-two-scales")
    assert done.stdout == f"{tmp_path / 'fp8'}: matrices in e4m3, one power of two (ue8m0) per block of 128x128\n"
    assert read_json(tmp_path / "fp8" / "config.json")["quantization_config"]["scale_fmt"] == "ue8m0"


def test_fp8_replaces_nothing(model, tmp_path):
    precious = tmp_path / "precious" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("thesis")
    before = (model / "config.json").read_bytes()
    for output in (precious.parent, precious, model):
        assert_refused(run("fp8", model, output), f"{output}: is there already; remove it, or name a new folder")
    assert (precious.read_text(), (model / "config.json").read_bytes()) == ("thesis", before)


def test_a_model_is_not_quantized_twice(model, tmp_path):
    assert run("fp8", model, tmp_path / "fp8").returncode == 0
    assert_refused(run("fp8", tmp_path / "fp8", tmp_path / "again"), "config.json: has a quantization_config")


@pytest.mark.parametrize("form", ["gguf", "fp8"])
def test_weights_that_are_cut_off_are_refused_and_nothing_is_written(model, tmp_path, form):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(run(form, model, tmp_path / "out"), "model.safetensors: damaged or cut off")
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_is_not_written_over_a_folder(model, tmp_path):
    assert_refused(run("gguf", model, tmp_path), "is a folder; name the file to be written")


def test_a_gguf_file_replaces_its_like_and_nothing_else(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    assert_refused(run("gguf", model, tmp_path / "thesis.txt"), "thesis.txt: is no GGUF file and would be lost")
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    for _ in range(2):
        assert run("gguf", model, tmp_path / "x.gguf").returncode == 0


def test_an_fp8_model_becomes_no_gguf(model, tmp_path):
    assert run("fp8", model, tmp_path / "fp8").returncode == 0
    assert_refused(run("gguf", tmp_path / "fp8", tmp_path / "x.gguf"), "config.json: has a quantization_config")


@pytest.mark.parametrize("form", ["gguf", "fp8"])
def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path, form):
    assert_refused(run(form, tmp_path, tmp_path / "out"), "holds no config.json; name a folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["gguf", "fp8"])
def test_a_model_of_another_type_is_refused_in_one_line_and_not_loaded(model, tmp_path, form):
    write_json(model / "config.json", {**read_json(model / "config.json"), "model_type": "kimi_k2"})
    line = "config.json: model_type is 'kimi_k2'; must be 'deepseek_v3'"
    assert_refused(run(form, model, tmp_path / "out"), line)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=line):
        check_model(model)


@pytest.mark.parametrize("form", ["gguf", "fp8"])
def test_a_folder_without_weights_is_refused_and_nothing_is_written(model, tmp_path, form):
    (model / "model.safetensors").unlink()
    assert_refused(run(form, model, tmp_path / "out"), "holds no *.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_missing_weight_is_refused_and_nothing_is_written(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert_refused(run("gguf", model, tmp_path / "x.gguf"), "do not match: model.norm.weight missing")
    assert not list(tmp_path.glob("*.gguf*"))


def test_an_impossible_architecture_is_refused_in_one_line(model, tmp_path):
    write_json(model / "config.json", read_json(model / "config.json") | {"n_group": 3})
    assert_refused(run("gguf", model, tmp_path / "x.gguf"), "n_group is 3; must divide")


def test_positions_that_llama_cpp_does_not_scale_are_refused_in_one_line(model, tmp_path):
    config = read_json(model / "config.json")
    rope = {**config["rope_parameters"], "rope_type": "linear", "factor": 2.0}
    write_json(model / "config.json", config | {"rope_parameters": rope})
    line = "rope_parameters.rope_type is linear; llama.cpp reads default and yarn"
    assert_refused(run("gguf", model, tmp_path / "x.gguf"), line)


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['dsv3.export', 'gguf', '--help']\n"
        "try:\n"
        "    runpy.run_module('dsv3.export', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers', 'gguf', 'numpy'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0

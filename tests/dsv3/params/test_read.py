import copy
import json
import os
from io import StringIO
from pathlib import Path
from typing import Annotated, Literal

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from dsv3.errors import UserError
from dsv3.params.architecture import read_architecture
from dsv3.params.read import Params, read_params, schema_text
from dsv3.params.section import OneOf, Section, error_line
from tests.committed import PROJECT

VALUES = YAML(typ="safe").load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
SECTIONS = [name for name, value in VALUES.items() if isinstance(value, dict)]
# The messages below name these numbers, whatever the shipped ones are.
ARCHITECTURE = json.loads((PROJECT / "mini_model" / "config_nano.json").read_text(encoding="utf-8")) | {
    "vocab_size": 1024,
    "max_position_embeddings": 1024,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
VALUES["tokenize"] |= {"tokenizer": "byte_level_bpe", "vocab_size": 1024}
VALUES["train"] |= {
    "block_size": 256,
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.05,
    "bias_freeze_ratio": 0.03,
}
VALUES["evaluate"] |= {"block_size": 256, "stride": 128}
VALUES["runtime"] |= {"num_processes": 1}
VALUES["model"] |= {"config": "mini_model/config_nano.json"}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A folder with a model's configuration and no params.yaml yet."""
    (tmp_path / "mini_model").mkdir()
    (tmp_path / "mini_model" / "config_nano.json").write_text(json.dumps(ARCHITECTURE), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(changes):
    """The shipped parameters with `section.key` replaced."""
    values = copy.deepcopy(VALUES)
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        (values[section] if section else values)[key] = value
    return values


def write(values):
    text = StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False  # a parameter a line
    yaml.dump(values, text)
    Path("params.yaml").write_text(text.getvalue(), encoding="utf-8")


def mistake(values):
    """The one line with which reading `values` is answered."""
    write(values)
    with pytest.raises(UserError) as caught:
        read_params(Path("params.yaml"))
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_the_shipped_parameters_are_valid_and_every_line_of_them_is_commented(monkeypatch):
    lines = (PROJECT / "params.yaml").read_text(encoding="utf-8").splitlines()
    monkeypatch.chdir(PROJECT)
    read_params(Path("params.yaml"))
    stated = [line for line in lines if line and not line.startswith("#") and not line.lstrip().startswith("- ")]
    assert [line for line in stated if "#" not in line and not line.endswith(":")] == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train.learning_rate": -1}, "params.yaml: train.learning_rate is -1; must be >= 1e-10"),
        ({"train.learning_rate": "fast"}, "params.yaml: train.learning_rate is 'fast'; input should be a valid number"),
        ({"train.learning_rate": float("inf")}, "train.learning_rate is inf; input should be a finite number"),
        ({"train.learnin_rate": 1}, "params.yaml: train.learnin_rate is no parameter; did you mean learning_rate?"),
        ({"trian": {}}, "params.yaml: trian is no parameter; did you mean train?"),
        ({"train.use_fp8": None}, "params.yaml: train.use_fp8 is null; input should be a valid boolean"),
        ({"train.optim": "sgd"}, "params.yaml: train.optim is 'sgd'; must be one of 'adamw'"),
        ({"seed": True}, "params.yaml: seed is true; input should be a valid integer"),
        ({"train.learning_rate": True}, "params.yaml: train.learning_rate is true; input should be a valid number"),
        ({"train.learning_rate": "1e-3"}, "train.learning_rate is '1e-3'; input should be a valid number"),
        ({"train.learning_rate": 5e-324}, "train.learning_rate is 5e-324; must be >= 1e-10"),
        ({"train.learning_rate": 1.5}, "train.learning_rate is 1.5; must be <= 1"),
        ({"train.block_size": 32.0}, "train.block_size is 32.0; input should be a valid integer"),
        ({"train.use_fp8": 1}, "train.use_fp8 is 1; input should be a valid boolean"),
        ({"train.use_fp8": "yes"}, "train.use_fp8 is 'yes'; input should be a valid boolean"),
        ({"data.text_field": 3}, "data.text_field is 3; input should be a valid string"),
        ({"train.adam_epsilon": 1e-46}, "train.adam_epsilon is 1e-46; must be >= 1.17549e-38"),
        ({"train.weight_decay": 1e308}, "train.weight_decay is 1e+308; must be < 125, 1 / learning_rate, or a step"),
        ({"train.max_grad_norm": 1e-300}, "train.max_grad_norm is 1e-300; must be >= 1e-06"),
        ({"train.bias_update_rate": 2}, "train.bias_update_rate is 2; must be <= 1"),
        ({"train.sequence_loss_weight": 1e9}, "train.sequence_loss_weight is 1000000000.0; must be <= 10"),
        ({"train.num_train_epochs": 1e9}, "train.num_train_epochs is 1000000000.0; must be <= 1e+06"),
        ({"sample.temperature": 1e-320}, "sample.temperature is 1e-320; must be >= 0.01"),
        ({"runtime.dataloader_num_workers": 10**6}, "runtime.dataloader_num_workers is 1000000; must be <= 256"),
        ({"train.max_steps": 0}, "params.yaml: train.max_steps is 0; must be positive, or -1"),
        ({"train.warmup_ratio": 0.98}, "params.yaml: train: warmup_ratio + bias_freeze_ratio exceeds 1"),
        ({"train.experts": "gpu"}, "params.yaml: train.experts is 'gpu'; must be one of 'auto', 'reference', 'cpu'"),
        ({"seed": 2**63}, "params.yaml: seed is 9223372036854775808; must be < 9223372036854775808"),
        ({"sample.max_new_tokens": 1024}, "sample.max_new_tokens is 1024; must be < 1024, the max_position_embeddings"),
        ({"sample.top_p": 1.5}, "params.yaml: sample.top_p is 1.5; must be <= 1"),
        ({"sample.prompts": []}, "params.yaml: sample.prompts"),
        (
            {"sample.do_sample": False, "sample.num_return_sequences": 2},
            "params.yaml: sample.num_return_sequences is 2; must be 1 where do_sample is false, for all would be",
        ),
        (
            {"sample.speculative": True},
            "sample.speculative is true; needs a model with MTP modules, and num_nextn_predict_layers of "
            "mini_model/config_nano.json is 0; set it to 1, or sample.speculative to false",
        ),
        ({"data.source": "file"}, "params.yaml: data.path is empty; source 'file' needs"),
        ({"estimate_size.memory_budget_gib": 0}, "params.yaml: estimate_size.memory_budget_gib is 0; must be > 0"),
        ({"tokenize.vocab_size": 1025}, "must be <= 1024, the vocab_size of mini_model/config_nano.json"),
        ({"train.block_size": 1025}, "train.block_size is 1025; must be <= 1024, the max_position_embeddings of"),
        ({"evaluate.block_size": 1025}, "evaluate.block_size is 1025; must be <= 1024"),
        (
            {"estimate_size.context_tokens": 10**30},
            "context_tokens is 1000000000000000000000000000000; must be < 9223372036854775808",
        ),
        (
            {"tokenize.shard_tokens": 2**63},
            "tokenize.shard_tokens is 9223372036854775808; must be < 9223372036854775808",
        ),
        ({"train.gradient_accumulation_steps": 10**400}, "gradient_accumulation_steps is 1000"),
        ({"sample.num_return_sequences": 1001}, "sample.num_return_sequences is 1001; must be <= 1000"),
        ({"train.max_steps": 10**10}, "params.yaml: train.max_steps is 10000000000; must be <= 1000000000"),
        ({"train.init_from": "x" * 5000}, "must have at most 4096 characters, none of them NUL"),
        ({"data.timeout_s": 1e308}, "params.yaml: data.timeout_s is 1e+308; must be <= 3600"),
        ({"evaluate.stride": 257}, "evaluate.stride is 257; must be <= 256, evaluate.block_size, or tokens are"),
        ({"runtime.num_processes": 3}, "runtime.num_processes is 3; must divide train.gradient_accumulation_steps (1)"),
        (
            {"model.config": "mini_model/absent.json"},
            "model.config: mini_model/absent.json can't be read (No such file",
        ),
    ],
)
def test_a_mistake_is_answered_with_where_it_is_and_what_would_be_right(changes, line):
    assert line in mistake(changed(changes))


def test_a_bound_is_written_as_people_write_it():
    assert mistake(changed({"train.learning_rate": -1})) == "params.yaml: train.learning_rate is -1; must be >= 1e-10"


def test_a_missing_parameter_is_named():
    values = changed({})
    del values["sample"]["top_k"]
    assert mistake(values) == "params.yaml: sample.top_k is missing; every parameter must be stated"


def test_a_misspelt_key_is_reported_rather_than_the_missing_one_it_causes():
    values = changed({"tokenize.vocabsize": 512})
    del values["tokenize"]["vocab_size"]
    assert mistake(values) == "params.yaml: tokenize.vocabsize is no parameter; did you mean vocab_size?"


def test_a_key_like_no_other_is_answered_with_the_known_ones():
    assert mistake(changed({"model.zzz": 1})) == "params.yaml: model.zzz is no parameter; known: config"


def test_a_file_that_is_missing_or_no_yaml_is_one_line():
    with pytest.raises(UserError, match=r"^params.yaml: can't be read \(No such file"):
        read_params(Path("params.yaml"))
    Path("params.yaml").write_text("seed: 1\nmodel: [\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^params.yaml:\d+: not YAML"):
        read_params(Path("params.yaml"))
    Path("params.yaml").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"^params.yaml: .*is null"):
        read_params(Path("params.yaml"))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"n_group": 3}, "n_group is 3; must divide n_routed_experts (8)"),
        ({"n_group": 8}, "n_group is 8; must be <= 4, half of n_routed_experts (8), or 1"),
        ({"topk_group": 3}, "topk_group is 3; must be <= n_group (2)"),
        (
            {"num_experts_per_tok": 5},
            "num_experts_per_tok is 5; must be <= 4, the experts of topk_group (1) of n_group (2) groups of "
            "n_routed_experts (8)",
        ),
        ({"qk_rope_head_dim": 31}, "qk_rope_head_dim is 31; must be a multiple of 2"),
        ({"n_routed_experts": 0}, "n_routed_experts is 0; must be >= 1"),
        ({"q_lora_rank": 0}, "q_lora_rank is 0; must be >= 1"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0; input should be a valid integer"),
        ({"hidden_size": "4"}, "hidden_size is '4'; input should be a valid integer"),
        ({"n_routed_experts": True}, "n_routed_experts is true; input should be a valid integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; must be <= 1000"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1.0; must be >= 1.17549e-38"),
        ({"rms_norm_eps": True}, "rms_norm_eps is true; input should be a valid number"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0.0; must be >= 1.17549e-38"),
        ({"norm_topk_prob": "true"}, "norm_topk_prob is 'true'; input should be a valid boolean"),
        (
            {"aux_loss_alpha": float("nan")},
            "aux_loss_alpha is NaN; must be finite numbers and whole characters; leave it out",
        ),
        (
            {"id2label": {"0": float("inf")}},
            'id2label is {"0": Infinity}; must be finite numbers and whole characters; leave it out',
        ),
        (
            {"_name_or_path": "\ud800"},
            '_name_or_path is "\\ud800"; must be finite numbers and whole characters; leave it out',
        ),
        ({"n_routed_expert": 4}, "n_routed_expert is no field of this architecture; did you mean n_routed_experts?"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; must be one of 'silu'"),
        ({"model_type": "llama"}, "model_type is 'llama'; must be one of 'deepseek_v3' or 'deepseek_v3_variant'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; input should be a valid boolean"),
        ({"attention_dropout": 1.5}, "attention_dropout is 1.5; must be < 1"),
        (
            {"num_key_value_heads": 2},
            "num_key_value_heads is 2; must be num_attention_heads (4): every head has a key and a value of its own",
        ),
        (
            {"rope_theta": 500.0},
            "rope_theta says something else than rope_parameters, and would be ignored; leave it out",
        ),
        ({"rope_parameters": None, "rope_scaling": "yarn"}, "rope_scaling is 'yarn'; must be an object or null"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 0.5}},
            "rope_parameters.factor is 0.5; must be >= 1 for rope_type yarn",
        ),
        (
            {"rope_parameters": {"rope_theta": -1}},
            "rope_parameters.rope_theta is -1; must be a number >= 2 and <= 1e+12, or left out",
        ),
        (
            {"rope_parameters": {"rope_theta": True}},
            "rope_parameters.rope_theta is true; must be a number >= 2 and <= 1e+12, or left out",
        ),
        (
            {"rope_parameters": {"rope_theta": None}},
            "rope_parameters.rope_theta is null; must be a number >= 2 and <= 1e+12, or left out",
        ),
        (
            {"rope_parameters": {"rope_theta": 1}},
            "rope_parameters.rope_theta is 1; must be a number >= 2 and <= 1e+12, or left out",
        ),
        (
            {"rope_parameters": {"mscale": 1e300}},
            "rope_parameters.mscale is 1e+300; must be a number >= 0 and <= 100, or left out",
        ),
        (
            {"rope_parameters": {"beta_fast": 0.5}},
            "rope_parameters.beta_fast is 0.5; must be >= 1, beta_slow: fast dimensions are extrapolated",
        ),
        (
            {"rope_parameters": {"rope_thetta": 1e4}},
            "rope_parameters.rope_thetta is no field of it; did you mean rope_theta?",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is 0.5; must be 1: qk_rope_head_dim is the part that is rotated",
        ),
        ({"pad_token_id": -1}, "pad_token_id is -1; must be null, or >= 0 and < 1024, the vocab_size"),
        ({"eos_token_id": [1, 1024]}, "eos_token_id is 1024; must be null, or >= 0 and < 1024, the vocab_size"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4, "mscale_all_dim": 1.0}},
            "rope_parameters.mscale_all_dim is 1.0; must be left out for rope_type linear: "
            "programs disagree on whether it scales there",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor is null; must be >= 1 for rope_type yarn"),
    ],
)
def test_an_architecture_that_cannot_route_is_refused_when_the_parameters_are_read(changes, line):
    path = Path("mini_model/config_nano.json")
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    assert mistake(VALUES) == f"{path}: {line}"


@pytest.mark.parametrize(
    ("name", "value"), [("scoring_func", "no such"), ("topk_method", "no such"), ("moe_layer_freq", 2)]
)
def test_another_router_than_the_models_is_refused_when_the_parameters_are_read(name, value):
    path = Path("mini_model/config_nano.json")
    path.write_text(json.dumps(ARCHITECTURE | {name: value}), encoding="utf-8")
    assert mistake(VALUES).startswith(f"{path}: {name} is {value!r}; must be ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"[1]", ": holds [1]; must hold an object, as config.json does"),
        (b'{"hidden_size": 1, "hidden_size": 2}', ": not JSON that can be read (hidden_size is stated twice)"),
    ],
    ids=["list", "twice"],
)
def test_an_architecture_of_another_form_is_one_line(text, line):
    Path("mini_model/config_nano.json").write_bytes(text)
    assert mistake(VALUES).startswith(f"mini_model/config_nano.json{line}")


def test_a_whole_number_may_stand_for_a_fraction():
    write(changed({"train.learning_rate": 1, "train.weight_decay": 0}))
    assert read_params(Path("params.yaml")).train.learning_rate == 1.0


def test_every_mtp_module_sees_a_token():
    path = Path("mini_model/config_nano.json")
    path.write_text(json.dumps(ARCHITECTURE | {"num_nextn_predict_layers": 40}), encoding="utf-8")
    assert mistake(changed({"train.block_size": 32})) == (
        "params.yaml: train.block_size is 32; must be > 40, the num_nextn_predict_layers of "
        "mini_model/config_nano.json, each of which looks a token further on"
    )


DEEPSEEKS_OWN = {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "quantization_config": None,
    "rope_parameters": None,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    | {"original_max_position_embeddings": 4096},
    "rope_theta": 10000,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
}


def test_the_fields_of_published_configurations_are_known():
    path = Path("mini_model/config_nano.json")
    path.write_text(json.dumps(ARCHITECTURE | DEEPSEEKS_OWN), encoding="utf-8")
    assert read_architecture(path).rope_parameters["rope_theta"] == 10000


@pytest.mark.parametrize("config_class", ["ours", "stock"])
def test_what_transformers_exports_is_read(config_class):
    from transformers import DeepseekV3Config as Stock

    from mini_model.configuration_deepseek import DeepseekV3Config as Ours

    config = {"ours": Ours, "stock": Stock}[config_class](**ARCHITECTURE)
    config.save_pretrained("exported")
    assert read_architecture(Path("exported/config.json")).n_routed_experts == 8
    fields = config.to_dict() | {"num_nextn_predict_layers": 0}  # as stock's does not know it
    path = Path("mini_model/config_nano.json")
    path.write_text(json.dumps(fields), encoding="utf-8")
    assert read_architecture(path).n_routed_experts == 8


BOMB = "a: &a [x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{f'*{chr(97 + n)}, ' * 9}]\n" for n in range(12)
)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("seed: é".encode("latin-1"), "params.yaml:1: is not UTF-8 (byte 0xe9); save it as UTF-8"),
        ("seed: 1".encode("utf-16"), "params.yaml:1: is not UTF-8 (byte 0xff)"),
        (b"seed: 1\nmodel: \0", "params.yaml:2: holds a NUL character"),
        (b"seed: \x07", "params.yaml: not YAML that can be read (unacceptable character"),
        (BOMB.encode(), "params.yaml: stands for more than 100,000 values; write values, not aliases of aliases"),
        (b"seed: &a [*a, *a]", "params.yaml: stands for more than 100,000 values"),
        (b"[" * 100_000, "params.yaml: opens 51 brackets; must be nested <= 50 deep"),
        (b"- " * 30_000, "params.yaml: not YAML that can be read (it is nested too deeply)"),
        (b"a: [" + b"1," * 100_000 + b"]", "params.yaml: has 100,000 lines and commas; must have <= 5,000"),
        (b"seed: " + b"9" * 5000, "params.yaml: not YAML that can be read (Exceeds the limit"),
        (b"seed: 0x" + b"f" * 5000, "params.yaml: seed is a number of more digits than Python writes; must be <"),
        (b"x" * 900 + b": 1", f"params.yaml: {'x' * 60} is no parameter"),
        (b"seed: 2024-99-99", "params.yaml: not YAML that can be read (month must be in 1..12)"),
        (b"seed: !!int x", "params.yaml: not YAML that can be read (invalid literal"),
        (b"seed: !!python/object/apply:os.system [x]", "params.yaml:1: not YAML (could not determine a constructor"),
        (b'"a\\nb": 1', "params.yaml: a b is no parameter"),
        (b'seed: "\\ud800"', r"params.yaml: '\ud800' holds half of a surrogate pair; write the whole character"),
        (b'data: {path: [{a: "x\\udfff"}]}', r"params.yaml: 'x\udfff' holds half of a surrogate pair"),
        (b"#" * 300_000, "params.yaml: has more than 262,144 bytes"),
    ],
)
def test_a_file_that_no_one_should_parse_is_one_line(content, line):
    Path("params.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_params(Path("params.yaml"))
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["params.yaml", "mini_model/config_nano.json"])
def test_what_could_be_read_for_ever_is_not_opened(name):
    write(VALUES)
    Path(name).unlink()
    os.mkfifo(name)
    with pytest.raises(UserError, match=f"^{name}: is no regular file"):
        read_params(Path("params.yaml"))
    Path(name).unlink()
    Path(name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"^{name}: is no regular file"):
        read_params(Path("params.yaml"))


@pytest.mark.parametrize("name", ["params.yaml", "mini_model/config_nano.json"])
def test_a_byte_order_mark_is_no_part_of_the_file(name):
    write(VALUES)
    Path(name).write_bytes(b"\xef\xbb\xbf" + Path(name).read_bytes())
    assert read_params(Path("params.yaml")).seed == VALUES["seed"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"a": "é"}'.encode("latin-1"), ":1: is not UTF-8 (byte 0xe9); save it as UTF-8"),
        (b'{\n"a": "\0"}', ":2: holds a NUL character"),
        (b"[" * 100_000, ": not JSON that can be read (it is nested too deeply)"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", ": not JSON that can be read (Exceeds the limit"),
    ],
)
def test_an_architecture_that_no_one_should_parse_is_one_line(content, line):
    Path("mini_model/config_nano.json").write_bytes(content)
    assert mistake(VALUES).startswith(f"mini_model/config_nano.json{line}")


def test_a_path_with_a_nul_is_one_line():
    write(changed({"model.config": "mini_model/a"}))
    text = Path("params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(text.replace("mini_model/a", '"mini_model/a\\0"'), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"model.config is 'mini_model/a\\x00'; must have at most 4096 characters, none of them NUL"
    ):
        read_params(Path("params.yaml"))


def test_an_architecture_that_is_no_json_is_one_line():
    Path("mini_model/config_nano.json").write_text("{\n  oops\n}", encoding="utf-8")
    assert mistake(VALUES).startswith("mini_model/config_nano.json:2: not JSON")


LEAVES = [(section, key) for section in SECTIONS for key in VALUES[section]]
# ruamel writes a text such as `?0` without quotes, and then can't read it.
TEXT = st.text(max_size=4).filter(lambda text: not text.startswith("?"))
ODD = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | TEXT | st.lists(st.integers())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(leaf=st.sampled_from(LEAVES), value=ODD)
def test_any_value_anywhere_is_either_accepted_or_answered_in_one_line_that_names_its_place(leaf, value):
    section, key = leaf
    write(changed({f"{section}.{key}": value}))
    try:
        params = read_params(Path("params.yaml"))
    except UserError as error:
        assert "\n" not in str(error)
        assert section in str(error)
    else:
        assert getattr(getattr(params, section), key) == value


def test_numbers_written_the_yaml_1_2_way_are_read_as_dvc_reads_them():
    write(changed({"train.learning_rate": 0.25}))
    text = Path("params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(text.replace("learning_rate: 0.25", "learning_rate: 4e-3"), encoding="utf-8")
    assert read_params(Path("params.yaml")).train.learning_rate == 0.004


def test_an_editor_that_reads_the_schema_finds_what_the_stages_find():
    schema = json.loads(schema_text())
    jsonschema.validate(VALUES, schema)
    for wrong in ({"train.learning_rate": -1}, {"train.learnin_rate": 1}, {"train.optim": "sgd"}, {"seed": "x"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed(wrong), schema)


def test_a_name_from_a_table_is_refused_and_exported_as_one_from_a_literal_is():
    class Given(Section):
        by_table: Annotated[str, OneOf({"adamw": 1, "muon": 2})]
        by_literal: Literal["adamw", "muon"]

    with pytest.raises(ValidationError) as caught:
        Given.model_validate({"by_table": "sgd", "by_literal": "sgd"})
    lines = [error_line(error) for error in caught.value.errors()]
    assert lines[0] == "by_table is 'sgd'; must be one of 'adamw' or 'muon'"
    assert lines[0].replace("by_table", "by_literal") == lines[1]
    by_table, by_literal = Given.model_json_schema()["properties"].values()
    assert by_table["enum"] == by_literal["enum"] == ["adamw", "muon"]
    assert {**by_table, "title": ""} == {**by_literal, "title": ""}


def test_every_parameter_has_a_description_and_no_default():
    for section in SECTIONS:
        fields = Params.model_fields[section].annotation.model_fields
        assert [name for name, field in fields.items() if not field.description and name != "config"] == []
        assert [name for name, field in fields.items() if not field.is_required()] == []

import os
from dataclasses import replace

import pytest
import torch

from dsv3.fp8.recipe import Recipe
from dsv3.training.precision import fp8_recipe
from dsv3.training.setup import prepare_model, start_accelerator
from tests.training_inputs import WIDE, plan_of

CPU = torch.device("cpu")


def chosen(folder, **train):
    _, choices = prepare_model(plan_of(folder, architecture=WIDE, train={"use_fp8": True, **train}), CPU)
    return choices.precision, choices.experts


def test_params_yaml_asks_for_the_default_recipe(tmp_path):
    assert fp8_recipe(plan_of(tmp_path).params.train) == Recipe()
    assert chosen(tmp_path) == ("fp8_emulated", "dsv3_fp8_emulated")


@pytest.mark.parametrize(
    ("train", "word"),
    [
        ({"fp8_weight_quant": False}, "no_weight_quant"),
        ({"fp8_activation_quant": False}, "no_activation_quant"),
        ({"fp8_power_of_two_scales": True}, "power_of_two_scales"),
        ({"fp8_mx_blocks": True}, "mx_blocks"),
        ({"fp8_wgrad_quant": False}, "no_wgrad_quant"),
    ],
    ids=str,
)
def test_linear_layers_and_experts_get_one_recipe_and_their_names_say_how_it_deviates(tmp_path, train, word):
    assert chosen(tmp_path, **train) == (f"fp8_emulated_{word}", f"dsv3_fp8_emulated_{word}")


def test_a_run_tells_what_multiplies_in_fp8_where_the_gpu_does(tmp_path):
    _, choices = prepare_model(plan_of(tmp_path, architecture=WIDE, train={"use_fp8": True}), CPU)
    assert choices.fp8_linears is None
    assert "fp8_linears" not in choices.metrics()
    on_hopper = replace(choices, precision="fp8", fp8_linears="scaled_mm")
    assert "linear layers in fp8 by scaled_mm, experts by" in on_hopper.summary()
    assert on_hopper.metrics()["fp8_linears"] == "scaled_mm"


def test_the_experts_alone_cache_their_swiglu_in_fp8(tmp_path):
    assert chosen(tmp_path, fp8_swiglu_cache=True) == ("fp8_emulated", "dsv3_fp8_emulated_swiglu_cache")


@pytest.mark.parametrize(
    "train", [{"fp8_power_of_two_scales": True}, {"fp8_wgrad_quant": False}, {"fp8_mx_blocks": True}], ids=str
)
def test_a_deviation_changes_the_gradients_of_linear_layers_and_of_experts(tmp_path, train):
    gradients = []
    for change in ({}, train):
        plan = plan_of(tmp_path, architecture=WIDE, train={"use_fp8": True, **change})
        model, _ = prepare_model(plan, CPU)
        tokens = torch.randint(0, 257, (2, 33), generator=torch.Generator().manual_seed(0))
        model.train()(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name in ("self_attn.o_proj.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        assert not torch.equal(*(found[f"model.layers.1.{name}"] for found in gradients)), name


def test_full_determinism_is_torchs_and_cublas_own_and_off_by_default(tmp_path, monkeypatch):
    torch.use_deterministic_algorithms(False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    start_accelerator(plan_of(tmp_path))
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # undone after the test
    start_accelerator(plan_of(tmp_path, runtime={"full_determinism": True}))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"

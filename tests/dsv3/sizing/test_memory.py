import json
from collections import Counter
from dataclasses import fields

import pytest
import torch

from dsv3.fp8.recipe import DEEPSEEK_RECIPE, RECIPES, Recipe
from dsv3.kernels import cpu_attention
from dsv3.kernels.convert import convert, emulate_bf16
from dsv3.kernels.registry import register_experts
from dsv3.kernels.weight_cache import cached_weights
from dsv3.params.architecture import Architecture, read_architecture
from dsv3.params.expert_backends import AUTO, BACKENDS, auto_of_native_device
from dsv3.params.optimizers import MAX_BATCH_NUMBERS, OPTIMIZERS
from dsv3.sizing.activations import (
    Workload,
    activation_bytes,
    derived_weight_bytes,
    logits_bytes,
    moe_layer_bytes,
    weight_cast_bytes,
)
from dsv3.sizing.memory import (
    inference_weights_bytes,
    kv_cache_bytes_per_token,
    largest_batch,
    num_matrix_parameters,
    training_memory,
    without_moments,
    workload,
)
from dsv3.training.optimizer import Optimizer, parameter_groups
from dsv3.training.regularization import drop_hidden
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM, DeepseekV3MoE
from tests.committed import DEFAULTS, PROJECT
from tests.dsv3.sizing.memory_probe import LiveBytes, saved_bytes

TRAIN = DEFAULTS.train
NANO = json.loads((PROJECT / "mini_model" / "config_nano.json").read_text(encoding="utf-8"))
# Sizes that no two tensors share, so that a term left out or counted twice shows.
ODD = NANO | {
    "vocab_size": 90,
    "hidden_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "q_lora_rank": 22,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU = torch.device("cpu")
"""Estimates of CUDA differ by two fused kernels, whose tensors only a GPU could show."""


def model_of(sizes, precision, experts, recipe=DEEPSEEK_RECIPE, attention=cpu_attention.NAME):
    torch.manual_seed(0)
    cpu_attention.register()
    config = DeepseekV3Config(**sizes)
    config._attn_implementation = attention
    model = DeepseekV3ForCausalLM(config).train()
    use_fp8 = experts.startswith("fp8")
    model.set_experts_implementation(register_experts(experts, CPU, DTYPES[precision], use_fp8, recipe))
    if use_fp8:
        convert(model, recipe, CPU)
    elif experts == "bf16_emulated":
        emulate_bf16(model)
    return model


def passed_precision(precision, experts):
    """An emulation runs in fp32, without autocast."""
    return "fp32" if experts.endswith("_emulated") else precision


def everything(model):
    operands = [getattr(module, "cached_operands", None) or [] for module in model.modules()]
    return [*model.parameters(), *model.buffers(), *(tensor for tensors in operands for tensor in tensors)]


def passed(model, tokens, precision):
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return model(tokens, labels=tokens, sequence_loss_weight=1e-4, mtp_loss_weight=0.3).loss


def kept_by_heads(a, w):
    """What the heads keep: their inputs, the log-softmax in fp32, the labels."""
    depths = range(a.num_nextn_predict_layers + 1)
    num_tokens = sum(w.num_sequences * (w.sequence_tokens - depth) for depth in depths)
    return num_tokens * (4 * a.vocab_size + w.compute_bytes * a.hidden_size + 8)


@pytest.mark.parametrize("attention", [cpu_attention.NAME, "sdpa"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("experts", ["cpu", "grouped_mm", "reference"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "first_k_dense_replace": 3},
        {"num_hidden_layers": 2, "first_k_dense_replace": 0, "num_nextn_predict_layers": 2},
    ],
    ids=["moe", "dense", "mtp"],
)
def test_the_estimate_is_what_autograd_keeps_of_the_real_model_to_half_a_percent(
    changes, experts, precision, attention
):
    """What is left out are index tensors of a few bytes per token; a forgotten tensor would be 1 % or more."""
    sizes = ODD | changes
    model = model_of(sizes, precision, experts, attention=attention)
    tokens = torch.randint(0, sizes["vocab_size"], (3, 200))
    measured = saved_bytes(lambda: passed(model, tokens, precision), everything(model))
    is_ours = attention == cpu_attention.NAME  # torch's keeps what it keeps with a mask, too
    a, w = Architecture(**sizes), Workload(3, 200, "cpu", precision, experts, cross_document_attention=is_ours)
    estimate = activation_bytes(a, w) + weight_cast_bytes(a, w) + kept_by_heads(a, w)
    assert estimate == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_keeps_two_masks_per_layer(precision):
    model = model_of(ODD, precision, "cpu")
    drop_hidden(model, 0.1)
    tokens = torch.randint(0, ODD["vocab_size"], (3, 40))
    measured = saved_bytes(lambda: passed(model, tokens, precision), everything(model))
    a, w = Architecture(**ODD), Workload(3, 40, "cpu", precision, "cpu", drops_hidden=True)
    estimate = activation_bytes(a, w) + weight_cast_bytes(a, w) + kept_by_heads(a, w)
    assert estimate == pytest.approx(measured, rel=0.005)
    assert workload(TRAIN.model_copy(update={"hidden_dropout": 0.1}), "cpu").drops_hidden
    assert not workload(TRAIN, "cpu").drops_hidden


CASES = [
    (experts, precision, False)
    for experts in BACKENDS
    for precision in ("fp32", "bf16")
    if experts != "triton_fp8" and (experts, precision) != ("bf16_emulated", "fp32")
]


@pytest.mark.parametrize(("experts", "precision", "swiglu_cache"), [*CASES, ("fp8_emulated", "fp32", True)])
def test_an_moe_layer_keeps_what_the_estimate_says_with_every_backend_to_two_percent(experts, precision, swiglu_cache):
    model = model_of(NANO, precision, experts, Recipe(swiglu_cache=swiglu_cache))
    moe = next(module for module in model.modules() if isinstance(module, DeepseekV3MoE))
    hidden = torch.randn(2, 64, NANO["hidden_size"], requires_grad=True)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=passed_precision(precision, experts) == "bf16"):
            output, logits, _ = moe(hidden)
            return output, (logits.sigmoid() * 2).exp()  # the sequence-wise loss keeps the scores once more

    # The input is the norm's output, which belongs to the layer.
    with cached_weights(model):
        measured = saved_bytes(run, everything(model))
    w = Workload(2, 64, "cpu", passed_precision(precision, experts), experts, swiglu_cache=swiglu_cache)
    assert moe_layer_bytes(Architecture(**NANO), w) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "block_size": 1024, "per_device_train_batch_size": 1},
        {"gradient_accumulation_steps": 2},
        {"block_size": 32, "optim": "adamw"},
        {"block_size": 32, "optim": "adamw", "adam_moments_dtype": "bf16"},
        *({"block_size": 16, "optim": optim} for optim in OPTIMIZERS),
        *({"block_size": 16, "optim": optim, "ema_decay": 0.9} for optim in OPTIMIZERS),
        {"block_size": 16, "precision": "bf16", "experts": "grouped_mm"},
    ],
    ids=str,
)
def test_the_peak_of_two_real_optimizer_steps_is_the_estimate_to_a_tenth(changes):
    """The estimate leaves out short-lived gradients inside a layer: 6 % with checkpointing, 1 % elsewhere."""
    common = {"per_device_train_batch_size": 4, "block_size": 128, "precision": "fp32", "experts": "cpu"}
    train = TRAIN.model_copy(update=common | {"optim": "adamw", "adam_moments_dtype": "fp32"} | changes)
    model = model_of(NANO, train.precision, train.experts)
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable()
    precision = passed_precision(train.precision, train.experts)
    stepper = Optimizer(parameter_groups(model, train), train, DTYPES[precision])
    shape = (train.per_device_train_batch_size, train.block_size)
    tokens = torch.randint(0, NANO["vocab_size"], shape)
    with LiveBytes([*everything(model), tokens]) as memory_in_use:
        for _ in range(2):
            for _ in range(train.gradient_accumulation_steps):
                passed(model, tokens, precision).backward()
            stepper.step()
            stepper.zero_grad(set_to_none=True)
    estimate = training_memory(Architecture(**NANO), train, "cpu")
    assert estimate.peak_bytes == pytest.approx(memory_in_use.peak, rel=0.1)
    at_rest = estimate.weights_bytes + estimate.optimizer_states_bytes
    assert at_rest == pytest.approx(memory_in_use.live, rel=0.001)


@pytest.mark.parametrize(
    ("experts", "precision", "mx_blocks"),
    [("fp8_emulated", "fp32", False), ("fp8_emulated", "fp32", True), ("bf16_emulated", "bf16", False)],
)
def test_an_emulation_holds_rounded_copies_of_every_weight_while_gradients_are_accumulated(
    experts, precision, mx_blocks
):
    model = model_of(NANO, precision, experts, Recipe(mx_blocks=mx_blocks))
    with cached_weights(model):
        operands = [getattr(module, "cached_operands", None) or [] for module in model.modules()]
        held = sum(tensor.nbytes for tensors in operands for tensor in tensors)
    w = Workload(1, 16, "cpu", "fp32", experts, mx_blocks=mx_blocks)
    assert held == derived_weight_bytes(Architecture(**NANO), w)


@pytest.mark.parametrize(
    "sizes", [{"block_size": 8, "optim": "muon"}, {"per_device_train_batch_size": 4, "block_size": 128}], ids=str
)
def test_rounded_copies_of_weights_count_in_the_passes_and_not_in_the_update(sizes):
    """With few tokens the update needs the most, with many a pass."""
    common = {"per_device_train_batch_size": 1, "optim": "adamw", "adam_moments_dtype": "fp32", "use_fp8": True}
    train = TRAIN.model_copy(update=common | {"precision": "fp32", "experts": "fp8_emulated"} | sizes)
    model = model_of(NANO, "fp32", "fp8_emulated")
    stepper = Optimizer(parameter_groups(model, train), train, torch.float32)
    tokens = torch.randint(0, NANO["vocab_size"], (train.per_device_train_batch_size, train.block_size))
    with LiveBytes([*everything(model), tokens]) as memory_in_use:
        for _ in range(2):
            with cached_weights(model):
                passed(model, tokens, "fp32").backward()
            stepper.step()
            stepper.zero_grad(set_to_none=True)
    estimate = training_memory(Architecture(**NANO), train, "cpu")
    assert estimate.derived_weights_bytes > 0.1 * estimate.peak_bytes
    assert estimate.peak_bytes == pytest.approx(memory_in_use.peak, rel=0.1)


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("config", ["config.json", "config_tiny.json", "config_nano.json"])
def test_the_chosen_optimizer_is_given_as_many_parameters_as_the_estimate_says(config, optim):
    sizes = json.loads((PROJECT / "mini_model" / config).read_text(encoding="utf-8")) | {"num_nextn_predict_layers": 1}
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))
    groups = parameter_groups(model, TRAIN.model_copy(update={"optim": optim}))
    numbers = {group["name"]: sum(parameter.numel() for parameter in group["params"]) for group in groups}
    if optim != "adamw":  # which has head and routers in the same group
        assert numbers[optim] == num_matrix_parameters(Architecture(**sizes))


@pytest.mark.parametrize(("device", "use_fp8"), [("cpu", False), ("cpu", True), ("cuda", False), ("cuda", True)])
def test_the_estimate_of_auto_is_that_of_the_backend_which_a_native_device_takes(device, use_fp8):
    name = auto_of_native_device(device, use_fp8)
    assert name == AUTO[device, use_fp8, (device, use_fp8) != ("cpu", True)]
    train = TRAIN.model_copy(update={"use_fp8": use_fp8, "experts": "auto"})
    a = Architecture(**NANO)
    assert training_memory(a, train, device) == training_memory(a, train.model_copy(update={"experts": name}), device)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_a_recipe_without_kernels_is_estimated_as_the_emulation_that_a_gpu_runs(recipe):
    knobs = {f"fp8_{field.name}": getattr(recipe, field.name) for field in fields(recipe)}
    train = TRAIN.model_copy(update={"use_fp8": True, "experts": "auto", **knobs})
    found = workload(train, "cuda")
    assert found.experts == ("triton_fp8" if recipe.has_kernels else "fp8_emulated")
    assert found.mx_blocks == recipe.mx_blocks


def test_a_swiglu_cache_in_fp8_is_estimated_where_fp8_is_trained_in_and_saves_nearly_three_quarters():
    cached = {"fp8_swiglu_cache": True, "precision": "fp32"}
    a = Architecture(**NANO)
    estimates = {
        use_fp8: [
            training_memory(a, TRAIN.model_copy(update={"use_fp8": use_fp8, **change}), "cpu").activations_bytes
            for change in ({"precision": "fp32"}, cached)
        ]
        for use_fp8 in (False, True)
    }
    assert estimates[False][0] == estimates[False][1]
    num_tokens = TRAIN.per_device_train_batch_size * TRAIN.block_size
    num_moe_layers = sum(a.is_moe(layer) for layer in range(a.num_hidden_layers))
    gate_up = num_moe_layers * num_tokens * a.num_experts_per_tok * 2 * a.moe_intermediate_size
    assert a.num_nextn_predict_layers == 0
    assert estimates[True][0] - estimates[True][1] == gate_up * 4 - gate_up * 1 - gate_up // 128 * 4


def test_offloaded_moments_leave_room_for_two_of_the_largest_parameter():
    mini = read_architecture(PROJECT / "mini_model" / "config.json")
    train = TRAIN.model_copy(
        update={"optim": "adamw", "gradient_checkpointing": True, "per_device_train_batch_size": 1}
    )
    whole = training_memory(mini, train, "cuda")
    rest = without_moments(whole, mini, train)
    assert whole.peak_bytes - rest.peak_bytes > 0.9 * whole.optimizer_states_bytes
    assert rest.optimizer_workspace_bytes == whole.optimizer_workspace_bytes + 2 * 4 * 129_280 * 2_048


def test_a_large_vocabulary_costs_a_chunk_of_logits_instead_of_all_of_them():
    mini = read_architecture(PROJECT / "mini_model" / "config.json")
    small = logits_bytes(mini, Workload(1, 256, "cuda", "bf16", "grouped_mm"))
    large = logits_bytes(mini, Workload(8, 4096, "cuda", "bf16", "grouped_mm"))
    whole = 3 * 4 * mini.vocab_size * 8 * 4096
    assert small > 3 * 4 * mini.vocab_size * 256
    assert large < whole / 15


def test_the_latent_cache_holds_one_latent_and_one_rotary_key_per_layer():
    mini = read_architecture(PROJECT / "mini_model" / "config.json")
    assert kv_cache_bytes_per_token(mini, "bf16") == 24 * (512 + 64) * 2
    assert kv_cache_bytes_per_token(mini, "fp32") == 2 * kv_cache_bytes_per_token(mini, "bf16")


def test_served_weights_shrink_with_their_type_but_fp8_leaves_embedding_and_head_alone():
    tiny = read_architecture(PROJECT / "mini_model" / "config_tiny.json")
    fp32, bf16, fp8 = (inference_weights_bytes(tiny, dtype) for dtype in ("fp32", "bf16", "fp8"))
    bias = 4 * 11 * 8
    assert fp32 == 4 * 142_435_584 + bias
    assert bf16 == 2 * 142_435_584 + bias
    high_precision = 2 * 2 * 32000 * 768
    assert bf16 / 2 + high_precision / 2 < fp8 < bf16 / 2 + high_precision / 2 + 0.01 * bf16
    with_mtp = tiny.model_copy(update={"num_nextn_predict_layers": 2})
    assert inference_weights_bytes(with_mtp, "bf16") == bf16, "the main network alone is served"


def test_the_largest_batch_of_an_all_dense_model_is_its_dense_layers():
    """56.6 million numbers: gate, up and down of twelve layers, of one shape but for their orientation."""
    tiny = read_architecture(PROJECT / "mini_model/config_tiny.json")
    dense = tiny.model_copy(update={"first_k_dense_replace": tiny.num_hidden_layers})
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**dense.model_dump()))
    by_shape = Counter()
    for parameter in model.model.layers.parameters():
        if parameter.dim() == 2:
            by_shape[tuple(sorted(parameter.shape))] += parameter.numel()
    shape, numbers = by_shape.most_common(1)[0]
    assert largest_batch(dense, 1) == (min(numbers, MAX_BATCH_NUMBERS), max(shape))

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dsv3.params.optimizers import OPTIMIZERS
from dsv3.params.train import TrainParams
from dsv3.training import optimizer as module
from dsv3.training.optimizer import AVERAGE, Matrices, Optimizer, orthogonalized, parameter_groups, same_shape_batches
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests import committed
from tests.training_inputs import MICRO

DEFAULTS = committed.DEFAULTS.train.model_dump()


def params(**values) -> TrainParams:
    return TrainParams(**{**DEFAULTS, "learning_rate": 0.01, **values})


def micro_model(**architecture) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**MICRO, **architecture})).train()


def optimizer_of(model: DeepseekV3ForCausalLM, **values) -> Optimizer:
    given_params = params(**values)
    return Optimizer(parameter_groups(model, given_params), given_params, torch.float32)


def train(model: DeepseekV3ForCausalLM, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 272, (2, 9), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], mtp_loss_weight=0.3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def names_by_group(model: DeepseekV3ForCausalLM, **values) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, params(**values))
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_loaded_moments_do_not_bring_their_weight_decay():
    model = micro_model()
    written, own = optimizer_of(model, weight_decay=1.5), optimizer_of(model, weight_decay=0.1)
    train(model, written, range(1))
    own.load_state_dict(written.state_dict())
    decays = {group["name"]: group["weight_decay"] for group in own.param_groups}
    assert decays == {
        group["name"]: group["weight_decay"] for group in optimizer_of(model, weight_decay=0.1).param_groups
    }
    assert max(decays.values()) == 0.1
    assert all(
        torch.equal(own.state[one]["step"], state["step"]) for one, state in written.state.items() if "step" in state
    )


def test_every_parameter_is_in_one_group_and_only_maps_go_to_muon():
    model = micro_model()
    groups = names_by_group(model, optim="muon")
    assert sum(len(names) for names in groups.values()) == len(list(model.parameters()))
    assert groups["adamw"] == {"lm_head.weight", "model.layers.1.mlp.gate.weight", "model.layers.2.mlp.gate.weight"}
    assert "model.embed_tokens.weight" in groups["adamw_not_decayed"]
    assert all("norm" in name or "embed" in name for name in groups["adamw_not_decayed"])
    assert {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.2.eh_proj.weight"} <= groups["muon"]


def test_norms_and_embeddings_are_not_decayed_and_a_tied_head_is_an_embedding():
    groups = parameter_groups(micro_model(), params(optim="adamw", weight_decay=0.1))
    assert {group["name"]: group["weight_decay"] for group in groups} == {"adamw_not_decayed": 0.0, "adamw": 0.1}
    tied = names_by_group(micro_model(tie_word_embeddings=True), optim="adamw")
    assert "model.embed_tokens.weight" in tied["adamw_not_decayed"]


def test_adamw_is_torchs_adamw():
    ours, theirs = micro_model(), micro_model()
    given_params = params(optim="adamw")
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]}
        for group in parameter_groups(theirs, given_params)
    ]
    betas = (given_params.adam_beta1, given_params.adam_beta2)
    train(ours, optimizer_of(ours, optim="adamw"), range(5))
    train(theirs, torch.optim.AdamW(groups, lr=0.01, betas=betas, eps=given_params.adam_epsilon, fused=True), range(5))
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_bf16_moments_take_half_the_memory_and_train_alike():
    reports, losses = {}, {}
    for dtype in ("fp32", "bf16"):
        model = micro_model()
        optimizer = optimizer_of(model, optim="adamw", adam_moments_dtype=dtype)
        train(model, optimizer, range(10))
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        reports[dtype] = sum(moment.nbytes for moment in moments)
        tokens = torch.randint(0, 272, (4, 9), generator=torch.Generator().manual_seed(99))
        losses[dtype] = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.item()
    assert reports["bf16"] * 2 == reports["fp32"]
    # Each moment is off by at most 0.4 %, each update by about as much, ten updates of a loss near 5.6.
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-3)


def test_every_optimizer_that_a_parameter_may_name_has_an_update():
    assert set(module.UPDATES) == {module.NOT_DECAYED, *OPTIMIZERS}


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_saved_and_loaded_state_goes_on_bit_for_bit(optim, dtype):
    whole = micro_model()
    train(whole, optimizer_of(whole, optim=optim, adam_moments_dtype=dtype), range(6))

    first, buffer = micro_model(), io.BytesIO()
    before = optimizer_of(first, optim=optim, adam_moments_dtype=dtype)
    train(first, before, range(3))
    torch.save(before.state_dict(), buffer)
    buffer.seek(0)
    second = micro_model()
    second.load_state_dict(first.state_dict())
    after = optimizer_of(second, optim=optim, adam_moments_dtype=dtype)
    after.load_state_dict(torch.load(buffer, weights_only=True))
    train(second, after, range(3, 6))
    for (name, weight), other in zip(whole.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(weight, other[1]), name


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 24), extra=st.integers(0, 24), seed=st.integers(0, 10**6))
def test_newton_schulz_brings_singular_values_to_one_and_keeps_the_singular_vectors(rows, extra, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(1, rows, rows + extra, generator=generator)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    result = u.mT @ orthogonalized(matrix) @ vh.mT
    kept = s[0] > 0.02 * s[0].max()  # smaller ones have not risen yet after five rounds
    values = result[0].diagonal()
    assert ((values > 0.3) & (values < 1.3))[kept].all()
    # fp32 rounding, raised by the slope at zero (3.4 per round, 3.4 ** 5 = 480 in all)
    assert (result[0] - values.diag()).abs().max() < 1e-3


def test_a_gradient_of_zero_changes_nothing_but_the_decay():
    assert orthogonalized(torch.zeros(1, 3, 4)).abs().max() == 0


def test_muons_update_has_the_size_of_adamws():
    model = micro_model(hidden_size=128, intermediate_size=256)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = optimizer_of(model, optim="muon", weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.set_learning_rate(0.01)
    optimizer.step()
    for name, weight in model.named_parameters():
        if name in ("model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"):
            rms = (weight.detach() - before[name]).square().mean().sqrt().item() / 0.01
            assert rms == pytest.approx(0.2, rel=0.25), name  # singular values lie in 0.7 to 1.2, not at 1


def test_a_stack_of_experts_is_updated_as_its_matrices_would_be_one_by_one():
    """Gate and up of each expert are matrices of their own."""
    torch.manual_seed(0)
    experts, width, hidden = 3, 8, 20
    gate_up = torch.randn(experts, 2 * width, hidden)
    stacked = Matrices.of(gate_up, gate_up, num_parts=2)
    together = stacked.as_parameter(orthogonalized(stacked.update))
    for expert in range(experts):
        for part in (slice(0, width), slice(width, None)):
            alone = orthogonalized(gate_up[expert, part][None])[0]
            # A batched product may sum in another order than a single one.
            torch.testing.assert_close(together[expert, part], alone, rtol=1e-4, atol=1e-5)


def test_a_tall_matrix_is_updated_as_its_transpose():
    wide = torch.randn(4, 9)
    tall = wide.mT.contiguous()
    of_wide, of_tall = Matrices.of(wide, wide, 1), Matrices.of(tall, tall, 1)
    update = of_tall.as_parameter(orthogonalized(of_tall.update))
    torch.testing.assert_close(update.mT, of_wide.as_parameter(orthogonalized(of_wide.update)))
    assert of_tall.scale == of_wide.scale == pytest.approx(0.2 * 3)


def test_matrices_of_one_shape_share_a_call_unless_that_takes_too_much_memory(monkeypatch):
    made = [
        Matrices.of(nn.Parameter(torch.zeros(shape)), torch.zeros(shape), 1) for shape in [(4, 6), (6, 4), (2, 4, 6)]
    ]
    assert [len(batch) for batch in same_shape_batches(made)] == [3]
    monkeypatch.setattr(module, "MAX_BATCH_NUMBERS", 48)
    assert [len(batch) for batch in same_shape_batches(made)] == [2, 1]


@pytest.mark.parametrize(
    "values", [{"optim": "adamw"}, {"optim": "adamw", "adam_moments_dtype": "bf16"}, {"optim": "muon"}]
)
def test_moments_that_visit_the_device_one_by_one_train_the_same(values):
    """On a CPU no place differs; that each parameter is updated by itself does."""
    own, visiting = micro_model(), micro_model()
    train(own, optimizer_of(own, **values), range(3))
    given_params = params(**values)
    groups = parameter_groups(visiting, given_params)
    train(visiting, Optimizer(groups, given_params, torch.float32, offloads=True), range(3))
    for name, weight in own.named_parameters():
        assert torch.equal(weight, dict(visiting.named_parameters())[name]), name


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_offloaded_moments_stay_in_the_cpus_memory_after_a_step_and_after_loading(optim, dtype, ema_decay, monkeypatch):
    """Fake tensors of a GPU: they have a place and no numbers. How long a step takes there, they can't say."""
    monkeypatch.setattr(module, "fuses_bf16_moments", lambda _: True)
    monkeypatch.setattr(module, "orthogonalized", torch.empty_like)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for name, value in {"is_available": True, "device_count": 1, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given_params = params(optim=optim, adam_moments_dtype=dtype, ema_decay=ema_decay)

    def on_gpu(*shape: int) -> FakeTensor:
        return FakeTensor(mode, torch.empty(shape, device="meta"), torch.device("cuda:0"))

    with mode:
        weights = [nn.Parameter(on_gpu(4, 8)), nn.Parameter(on_gpu(8, 8))]
        group = {"name": optim, "params": weights, "num_parts": [1, 1], "weight_decay": 0.1}
        optimizer = Optimizer([group], given_params, torch.float32, offloads=True)
        for weight in weights:
            weight.grad = on_gpu(*weight.shape)
        optimizer.step()
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        optimizer.step()
    averages = [state.pop(AVERAGE) for state in optimizer.state.values() if AVERAGE in state]
    assert [(average.device.type, average.dtype) for average in averages] == [("cpu", torch.float32)] * 2 * (
        ema_decay > 0
    )
    moments = [(n, m) for state in optimizer.state.values() for n, m in state.items() if n != "step"]
    assert len(moments) == 2 * OPTIMIZERS[optim].moments
    expected = torch.bfloat16 if dtype == "bf16" else torch.float32
    assert {(moment.device.type, moment.dtype) for _, moment in moments} == {("cpu", expected)}
    assert all(weight.device.type == "cuda" for weight in weights)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import SCORING, DeepseekV3TopkRouter
from mini_model.validation_deepseek import VARIANTS


def choice_by_hand(scores, bias, num_groups, topk_group, top_k):
    """Equations 14 and 16 with group limits, one token at a time, in plain Python."""
    biased = [score + offset for score, offset in zip(scores, bias, strict=True)]
    size = len(biased) // num_groups
    groups = [range(group * size, (group + 1) * size) for group in range(num_groups)]

    def group_score(group):
        return sum(sorted((biased[expert] for expert in group), reverse=True)[:2])

    best = sorted(groups, key=group_score, reverse=True)[:topk_group]
    candidates = [expert for group in best for expert in group]
    return sorted(sorted(candidates, key=lambda expert: biased[expert], reverse=True)[:top_k])


@settings(deadline=None, max_examples=60)
@given(
    topology=st.sampled_from([(8, 4, 2, 3), (8, 1, 1, 6), (8, 2, 1, 4), (16, 4, 3, 5), (6, 3, 3, 1)]),
    seed=st.integers(0, 10_000),
    normalized=st.booleans(),
)
def test_the_router_chooses_and_weighs_as_the_report_says(topology, seed, normalized):
    experts, groups, topk_group, top_k = topology
    config = DeepseekV3Config(
        hidden_size=10,
        n_routed_experts=experts,
        n_group=groups,
        topk_group=topk_group,
        num_experts_per_tok=top_k,
        norm_topk_prob=normalized,
    )
    generator = torch.Generator().manual_seed(seed)
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight, generator=generator)
    router.e_score_correction_bias.normal_(generator=generator)
    hidden = torch.randn(7, 10, generator=generator)
    _, gates, index = router(hidden)
    affinities = torch.sigmoid(hidden @ router.weight.T)
    for token in range(7):
        scores = affinities[token].tolist()
        expected = choice_by_hand(scores, router.e_score_correction_bias.tolist(), groups, topk_group, top_k)
        assert sorted(index[token].tolist()) == expected
        total = sum(scores[expert] for expert in expected) if normalized else 1.0
        for expert, gate in zip(index[token].tolist(), gates[token].tolist(), strict=True):
            assert gate == pytest.approx(2.5 * scores[expert] / total, rel=1e-5)
    if normalized:
        torch.testing.assert_close(gates.sum(dim=1), torch.full((7,), 2.5))


@pytest.mark.parametrize(
    ("name", "value", "published"),
    [("scoring_func", "no such", "sigmoid"), ("topk_method", "no such", "noaux_tc"), ("moe_layer_freq", 2, 1)],
)
def test_another_router_is_refused_in_one_line_that_names_the_choices(monkeypatch, name, value, published):
    line = f"{name} is {value!r}; must be {published!r}, the router of DeepSeek-V3"
    for known in ((published,), (published, "one"), (published, "one", "two")):
        monkeypatch.setitem(VARIANTS, name, known)
        with pytest.raises(ValueError) as caught:
            DeepseekV3Config(**{name: value})
        assert str(caught.value) == line + "".join(f", or {other!r}" for other in known[1:])


def test_every_scoring_function_that_a_configuration_may_name_is_there():
    assert tuple(SCORING) == VARIANTS["scoring_func"]


def test_gates_and_the_sequence_loss_read_the_affinities_of_the_scoring_function(micro_model, token_ids, monkeypatch):
    monkeypatch.setitem(VARIANTS, "scoring_func", ("sigmoid", "made_up"))
    monkeypatch.setitem(SCORING, "made_up", lambda logits: logits.softmax(dim=-1))
    model, ids = micro_model(scoring_func="made_up", norm_topk_prob=False, routed_scaling_factor=1.0), token_ids()
    hidden = torch.randn(5, 24)
    logits, gates, index = model.routers()[0][1](hidden)
    assert torch.equal(gates, logits.softmax(dim=-1).gather(1, index))
    out = model(ids, labels=ids, sequence_loss_weight=1.0, output_router_logits=True)
    expected = 0.0
    for logits in out.router_logits:
        for sequence in logits.detach().unflatten(0, (len(ids), -1)):
            hits = torch.zeros_like(sequence).scatter_(1, sequence.topk(2).indices, 1.0)
            expected += float((hits.mean(dim=0) * 8 / 2 * sequence.softmax(dim=-1).mean(dim=0)).sum()) / len(ids)
    assert out.sequence_loss.item() == pytest.approx(expected, rel=1e-5)


def test_scores_under_bf16_autocast_are_bit_equal_to_fp32s(micro_model):
    router = micro_model().routers()[0][1]
    hidden = torch.randn(50, 24)
    expected = router(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = router(hidden)
        assert (hidden @ router.weight.T).dtype == torch.bfloat16, "autocast is on, so the test can fail"
    for got, want in zip(autocast, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_the_bias_stays_fp32_and_keeps_moving_when_the_model_is_bf16(micro_model, tmp_path):
    model = micro_model(num_nextn_predict_layers=1)
    before = [router.e_score_correction_bias.clone() for _, router in model.routers()]
    model.save_pretrained(tmp_path)
    for cast in (model.to(torch.bfloat16), type(model).from_pretrained(tmp_path, dtype=torch.bfloat16), model.half()):
        for (_, router), bias in zip(cast.routers(), before, strict=True):
            assert router.weight.dtype != torch.float32
            assert router.e_score_correction_bias.dtype == torch.float32
            assert torch.equal(router.e_score_correction_bias, bias)
    bias = model.routers()[0][1].e_score_correction_bias.zero_()
    for _ in range(1000):
        bias += 0.001
    # bf16 would have stopped at 0.5
    torch.testing.assert_close(bias, torch.ones(8), rtol=1e-4, atol=0)


def test_no_gradient_reaches_the_bias(micro_model, token_ids):
    model, ids = micro_model(), token_ids()
    for _, router in model.routers():
        router.e_score_correction_bias.requires_grad_()
    model(ids, labels=ids, sequence_loss_weight=1.0).loss.backward()
    assert all(router.e_score_correction_bias.grad is None for _, router in model.routers())


def test_the_cross_entropy_alone_moves_every_router(micro_model, token_ids):
    """Through the gates; else only the sequence-wise loss would train the router, at a weight of 1e-4."""
    model, ids = micro_model(num_nextn_predict_layers=1), token_ids()
    model(ids, labels=ids, mtp_loss_weight=0.3, sequence_loss_weight=0.0).loss.backward()
    assert len(model.routers()) == 3
    assert all(router.weight.grad.abs().sum() > 0 for _, router in model.routers())


def test_training_counts_every_choice_and_evaluation_none_unless_asked(micro_model, token_ids):
    model, ids = micro_model(num_nextn_predict_layers=1), token_ids(2, 12)

    def loads():
        return {layer: router.expert_load.sum().item() for layer, router in model.routers()}

    model(ids, labels=ids, mtp_loss_weight=0.3)
    assert loads() == {1: 2 * 12 * 2, 2: 2 * 12 * 2, 3: 2 * 11 * 2}, "tokens x top-k; MTP has a token less per sequence"
    model.eval()(ids)
    assert loads()[1] == 48
    model.set_count_expert_load(True)
    model(ids)
    assert loads()[1] == 96
    model.set_count_expert_load(False)
    model(ids)
    assert loads()[1] == 96


def test_counts_are_those_of_the_routers_own_choice(micro_model, token_ids):
    model, ids = micro_model(), token_ids()
    chosen = []
    router = model.routers()[0][1]
    router.register_forward_hook(lambda _module, _args, output: chosen.append(output[2]))
    model(ids)
    assert torch.equal(router.expert_load, torch.bincount(chosen[0].flatten(), minlength=8))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_counts_once_and_changes_no_gradient(micro_model, token_ids, use_reentrant):
    ids = token_ids()

    def run(checkpointing):
        model = micro_model(num_nextn_predict_layers=1)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        calls = []
        model.routers()[0][1].register_forward_hook(lambda *_: calls.append(1))
        loss = model(ids, labels=ids, mtp_loss_weight=0.3, sequence_loss_weight=1.0).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return len(calls), [router.expert_load for _, router in model.routers()], gradients

    plain_calls, plain_loads, plain = run(False)
    calls, loads, gradients = run(True)
    assert (plain_calls, calls) == (1, 2), "the layer did run again"
    assert all(torch.equal(load, plain_load) for load, plain_load in zip(loads, plain_loads, strict=True))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6, msg=name)


@torch.no_grad()
def test_permuting_experts_inside_their_groups_changes_nothing(micro_model, token_ids):
    model, ids = micro_model().eval(), token_ids()
    expected = model(ids).logits
    within = [1, 0, 3, 2, 5, 4, 7, 6]
    groups_too = [4, 5, 0, 1, 6, 7, 2, 3]
    for order in (within, groups_too):
        for layer in model.model.layers[1:]:
            gate, experts = layer.mlp.gate, layer.mlp.experts
            tensors = (gate.weight, gate.e_score_correction_bias, experts.gate_up_proj, experts.down_proj)
            for tensor in tensors:
                tensor.copy_(tensor[order])
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_readable_expert_loop_equals_transformers_own_functions(micro_model, token_ids, implementation):
    model, ids = micro_model(), token_ids()
    gradients = {}
    for name in ("eager", implementation):
        model.set_experts_implementation(name)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients[name] = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    for key, gradient in gradients["eager"].items():
        torch.testing.assert_close(gradient, gradients[implementation][key], rtol=1e-4, atol=1e-6, msg=key)


def test_data_parallel_training_leaves_each_ranks_counts_alone(micro_model):
    model = micro_model(num_nextn_predict_layers=1)
    counters = {name for name, _ in model.named_buffers() if name.endswith("expert_load")}
    assert len(counters) == 3
    assert set(model._ddp_params_and_buffers_to_ignore) == counters
    assert not counters & set(model.state_dict())


def test_a_token_that_no_expert_likes_at_all_gets_no_nan(micro_model):
    router = micro_model().routers()[0][1]
    router.weight.data.fill_(-1e4)
    _, gates, _ = router(torch.ones(1, 24))
    assert torch.equal(gates, torch.zeros(1, 2))

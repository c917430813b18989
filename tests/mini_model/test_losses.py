import pytest
import torch
import torch.nn.functional as F

from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import sequence_balance_loss


def choosing(top_k):
    """A configuration of 8 experts, of which each token has `top_k`."""
    return DeepseekV3Config(n_routed_experts=8, num_experts_per_tok=top_k, n_group=1, topk_group=1)


def sequence_loss_by_hand(logits, top_k, num_sequences):
    """Equations 17 to 20 without alpha, one number at a time; the mean over sequences."""
    num_experts = logits.shape[1]
    total = 0.0
    for sequence in logits.double().sigmoid().unflatten(0, (num_sequences, -1)).tolist():
        chosen = [set(sorted(range(num_experts), key=lambda i: -token[i])[:top_k]) for token in sequence]
        for expert in range(num_experts):
            f = num_experts / (top_k * len(sequence)) * sum(expert in hits for hits in chosen)
            p = sum(token[expert] / sum(token) for token in sequence) / len(sequence)
            total += f * p
    return total / num_sequences


def test_the_sequence_loss_is_the_reports_and_reads_the_affinities_without_the_bias(micro_model, token_ids):
    model, ids = micro_model(), token_ids()
    out = model(ids, labels=ids, sequence_loss_weight=0.5, output_router_logits=True)
    assert len(out.router_logits) == 2
    expected = sum(sequence_loss_by_hand(logits, 2, 2) for logits in out.router_logits)
    assert out.sequence_loss.item() == pytest.approx(expected, rel=1e-5)
    assert out.loss.item() == pytest.approx(out.cross_entropy_loss.item() + 0.5 * expected, rel=1e-6)


def test_the_sequence_loss_is_one_at_balance_and_the_experts_number_over_k_at_collapse():
    even = torch.eye(8).repeat(4, 1) * 20 - 10
    assert sequence_balance_loss(even, choosing(1), num_sequences=4).item() == pytest.approx(1.0, rel=1e-5)
    collapsed = torch.full((32, 8), -20.0)
    collapsed[:, :2] = 10.0
    assert sequence_balance_loss(collapsed, choosing(2), num_sequences=4).item() == pytest.approx(8 / 2, rel=1e-5)


def test_the_sequence_loss_looks_at_each_sequence_alone():
    first, second = torch.full((5, 8), -20.0), torch.full((5, 8), -20.0)
    first[:, 0], second[:, 1] = 10.0, 10.0
    alone = sequence_balance_loss(first, choosing(1), 1)
    torch.testing.assert_close(sequence_balance_loss(torch.cat([first, second]), choosing(1), 2), alone)
    assert sequence_balance_loss(torch.cat([first, second]), choosing(1), 1) < alone


def test_its_gradient_pushes_an_overloaded_expert_down():
    logits = torch.zeros(16, 8)
    logits[:, 3] = 2.0
    logits.requires_grad_()
    sequence_balance_loss(logits, choosing(1), 2).backward()
    assert (logits.grad[:, 3] > 0).all()


def mtp_losses_by_hand(model, ids):
    """Equations 21 to 25, position by position: the module runs anew on each prefix, and only its last state counts."""
    trunk = model.model
    length = ids.shape[1]
    losses = []
    states = trunk(ids).last_hidden_state
    for depth in range(1, model.config.num_nextn_predict_layers + 1):
        layer = trunk.layers[model.config.num_hidden_layers + depth - 1]
        rows, nexts = [], []
        for position in range(length - depth):
            embeds = trunk.embed_tokens(ids[:, depth : position + depth + 1])
            previous = states[:, : position + 1]
            merged = layer.eh_proj(torch.cat([layer.enorm(embeds), layer.hnorm(previous)], dim=-1))
            context = trunk.attention_context(merged, None, None)
            update, _ = layer.self_attn(layer.input_layernorm(merged), *list(context.values())[1::-1])
            hidden = merged + update
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))[0]
            nexts.append(layer.shared_head["norm"](hidden)[:, -1])
            if position + depth + 1 < length:
                logits = model.lm_head(nexts[-1])
                rows.append(F.cross_entropy(logits, ids[:, position + depth + 1], reduction="none"))
        losses.append(torch.stack(rows).mean())
        states = torch.stack(nexts, dim=1)
    return losses


@pytest.mark.parametrize("depth", [1, 2])
def test_the_mtp_loss_equals_the_one_by_hand(micro_model, token_ids, depth):
    model, ids = micro_model(num_nextn_predict_layers=depth), token_ids(2, 8)
    out = model(ids, labels=ids, mtp_loss_weight=0.3)
    with torch.no_grad():
        expected = torch.stack(mtp_losses_by_hand(model, ids)).mean()
    torch.testing.assert_close(out.mtp_loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, out.cross_entropy_loss + 0.3 * out.mtp_loss)


def test_the_mtp_loss_sees_no_padding(micro_model, token_ids):
    model, ids = micro_model(num_nextn_predict_layers=1), token_ids(1, 9)
    labels = ids.clone()
    labels[:, :2] = -100  # targets of the padding's last position
    padding = torch.zeros(1, 3, dtype=torch.long)
    padded, mask = torch.cat([padding, ids], dim=1), torch.cat([padding, ids * 0 + 1], dim=1)
    padded_labels = torch.cat([padding - 100, labels], dim=1)
    alone = model(ids, labels=labels, mtp_loss_weight=1.0)
    together = model(padded, attention_mask=mask, labels=padded_labels, mtp_loss_weight=1.0)
    torch.testing.assert_close(together.mtp_loss, alone.mtp_loss, rtol=1e-5, atol=1e-6)


def test_mtp_modules_keep_packed_documents_apart(micro_model, token_ids):
    model, ids = micro_model(num_nextn_predict_layers=1), token_ids(1, 11)

    def states(tokens, position_ids=None):
        hidden = model.model(tokens, position_ids=position_ids).last_hidden_state
        return next(model.model.mtp_hidden_states(hidden, model.model.embed_tokens(tokens), None, position_ids))

    packed = states(ids, torch.cat([torch.arange(6), torch.arange(5)])[None])
    torch.testing.assert_close(packed[:, :5], states(ids[:, :6]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, 6:], states(ids[:, 6:]), rtol=1e-4, atol=1e-5)


def test_a_packed_documents_mtp_loss_is_its_tokens_alone(micro_model, token_ids):
    """Neither the state of one document's last token nor a target of the next one's takes part."""
    model, ids = micro_model(num_nextn_predict_layers=2), token_ids(1, 11)
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    packed = model(ids, labels=ids, position_ids=positions, mtp_loss_weight=1.0).mtp_loss

    def summed(depth, document, following):
        """Losses of the tokens of one document; its first token after it may be predicted, as the end of the text."""
        tokens = torch.cat([document, following], dim=1)
        hidden = model.model(tokens).last_hidden_state
        states = list(model.model.mtp_hidden_states(hidden, model.model.embed_tokens(tokens)))[depth - 1]
        logits = model.lm_head(states[:, : document.shape[1] - depth])
        targets = tokens[:, depth + 1 : document.shape[1] + 1]
        return [F.cross_entropy(row, target).item() for row, target in zip(logits[0], targets[0], strict=False)]

    first, second = (ids[:, :6], ids[:, 6:7]), (ids[:, 6:], ids[:, :0])
    expected = [torch.tensor(summed(depth, *first) + summed(depth, *second)).mean().item() for depth in (1, 2)]
    assert packed.item() == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_a_mtp_module_is_a_mixture_of_experts_even_behind_a_dense_trunk(micro_model, token_ids):
    model, ids = micro_model(num_nextn_predict_layers=1, first_k_dense_replace=9), token_ids()
    assert [layer for layer, _ in model.routers()] == [3]
    assert model(ids, labels=ids, sequence_loss_weight=1.0).sequence_loss is None
    assert model(ids, labels=ids, mtp_loss_weight=0.3, sequence_loss_weight=1.0).sequence_loss is not None


def test_training_under_bf16_autocast_stays_close_to_fp32(micro_model, token_ids):
    model, ids = micro_model(num_nextn_predict_layers=1, initializer_range=0.02), token_ids()
    model.set_experts_implementation("eager")
    settings = {"labels": ids, "mtp_loss_weight": 0.3, "sequence_loss_weight": 1e-4}
    expected = model(ids, **settings).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, **settings).loss
    assert loss.dtype == torch.float32
    # bf16 keeps 8 bits: logits of size 0.1 err by 1e-3, their mean by less
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_the_mtp_loss_trains_the_trunk_the_embedding_and_the_head(micro_model, token_ids):
    model, ids = micro_model(num_nextn_predict_layers=1), token_ids()
    model(ids, labels=ids, mtp_loss_weight=0.3).mtp_loss.backward()
    untouched = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert untouched == []


def test_without_its_weight_no_mtp_module_runs_and_no_other_gradient_changes(micro_model, token_ids):
    ids = token_ids()
    plain, with_module = micro_model(), micro_model(num_nextn_predict_layers=1)
    with_module.load_state_dict(plain.state_dict(), strict=False)
    outs = [model(ids, labels=ids) for model in (plain, with_module)]
    assert outs[1].mtp_loss is None
    torch.testing.assert_close(outs[0].loss, outs[1].loss, rtol=0, atol=0)
    outs[1].loss.backward()
    ahead = [parameter for name, parameter in with_module.named_parameters() if name.startswith("model.layers.3.")]
    assert ahead
    assert all(parameter.grad is None for parameter in ahead)


def test_a_model_without_mtp_modules_ignores_the_mtp_weight(micro_model, token_ids):
    model, ids = micro_model(), token_ids()
    out = model(ids, labels=ids, mtp_loss_weight=0.3)
    assert out.mtp_loss is None
    assert torch.equal(out.loss, out.cross_entropy_loss)


def test_training_on_labels_computes_no_logits_and_calls_the_models_cross_entropy(micro_model, token_ids):
    model, ids = micro_model(num_nextn_predict_layers=1), token_ids()
    calls = []

    def recording(hidden, head_weight, labels):
        calls.append((tuple(hidden.shape), head_weight is model.lm_head.weight, tuple(labels.shape)))
        return hidden.sum() * 0 + 7.0

    model.cross_entropy = recording
    out = model(ids, labels=ids, mtp_loss_weight=0.5)
    assert out.logits is None
    assert calls == [((24, 24), True, (24,)), ((22, 24), True, (22,))]
    assert out.loss.item() == pytest.approx(7.0 + 0.5 * 7.0)
    assert model.eval()(ids, labels=ids).logits is not None


def test_labels_shifted_or_not_and_ignored_give_the_loss_of_the_logits(micro_model, token_ids):
    model, ids = micro_model().eval(), token_ids()
    labels = ids.clone()
    labels[0, 3:6] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    shifted = model(ids, shift_labels=longer[:, 1:]).loss
    torch.testing.assert_close(shifted, F.cross_entropy(out.logits.flatten(0, 1), longer[:, 1:].flatten()))


def test_one_compiled_graph_holds_the_whole_training_forward(micro_model, token_ids):
    model, ids = micro_model(num_nextn_predict_layers=1), token_ids()
    settings = {"labels": ids, "mtp_loss_weight": 0.3, "sequence_loss_weight": 1e-4}
    expected = model(ids, **settings).loss
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, **settings).loss, expected)
    assert [router.expert_load.sum().item() for _, router in model.routers()] == [96, 96, 88], "counted in both calls"

from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsv3.evaluation.mtp_acceptance import MTPAcceptance
from dsv3.evaluation.sliding_window import PositionLoss, evaluate, score_split, sliding_windows
from dsv3.params.evaluate import EvaluateParams
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.drafting_model import drafting_model

SIZES = {name: {"characters": 100, "bytes": 100} for name in ("validation", "test")}
META = {"splits": SIZES, "bos_token_id": 0}


def tokens_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 257, count).astype(np.uint16)


def settings(**changes) -> EvaluateParams:
    defaults = {"per_device_eval_batch_size": 4, "block_size": 16, "stride": 6, "cross_document_attention": True}
    return EvaluateParams(**{**defaults, **changes})


@torch.no_grad()
def acceptance_by_hand(model: DeepseekV3ForCausalLM, tokens: np.ndarray, params: EvaluateParams, depth: int):
    """Count accepted predictions, nats and tokens of one module, each predicted from its document alone."""
    accepted, nats, count = 0, 0.0, 0
    for window in sliding_windows(len(tokens), params.block_size, params.stride):
        ids = torch.tensor(tokens[window.start : window.start + window.length + 1].astype(np.int64))
        for target in range(window.length - window.num_scored + 1, window.length + 1):
            begin = 0
            if not params.cross_document_attention:
                begin = max([0, *(ids[:target] == 0).nonzero().flatten().tolist()])
            origin = target - 1 - depth - begin  # the position whose state module 1 starts from
            if origin < 0:
                continue
            known = ids[None, begin:target]
            trunk = model.model(known, use_cache=False).last_hidden_state
            states = islice(model.model.mtp_hidden_states(trunk, model.model.embed_tokens(known)), depth)
            drafts = [model.lm_head(state[0, origin]) for state in states]
            choices = [model.lm_head(trunk[0, origin + k]).argmax() for k in range(1, depth + 1)]
            accepted += all(logits.argmax() == choice for logits, choice in zip(drafts, choices, strict=True))
            nats += float(F.cross_entropy(drafts[-1], ids[target]))
            count += 1
    return accepted, nats, count


@pytest.mark.parametrize(
    ("num_modules", "num_tokens", "changes"),
    [
        (1, 70, {}),
        (3, 70, {}),
        (2, 70, {"cross_document_attention": False}),
        (2, 40, {"stride": 16}),
        (2, 10, {}),
        (3, 3, {}),
        (1, 2, {}),
    ],
)
def test_acceptance_is_that_of_one_token_at_a_time(num_modules, num_tokens, changes):
    model, params, tokens = drafting_model("sometimes", num_modules), settings(**changes), tokens_of(num_tokens)
    tokens[::9] = 0
    streams = {"validation": tokens}
    acceptance = evaluate(model, streams, META, params).acceptance
    assert acceptance is not None
    for depth in range(1, num_modules + 1):
        accepted, nats, count = acceptance_by_hand(model, tokens, params, depth)
        assert (acceptance.accepted[depth - 1], acceptance.tokens[depth - 1]) == (accepted, count)
        # fp32 logits of batches of another size round differently
        assert acceptance.nats[depth - 1] == pytest.approx(nats, rel=1e-5)
    if num_tokens == 70:  # otherwise a constant would pass
        assert 0 < acceptance.accepted[0] < acceptance.tokens[0]


@pytest.mark.parametrize(("agreement", "rate"), [("always", 1.0), ("never", 0.0)])
def test_modules_that_always_or_never_agree_with_the_trunk_are_scored_so(agreement, rate):
    model = drafting_model(agreement, 2)
    metrics = evaluate(model, {"validation": tokens_of(60), "test": tokens_of(30)}, META, settings()).metrics()
    assert [row["mtp_acceptance"] for row in metrics["mtp"].values()] == [rate, rate]
    # a split's first token has nothing before it; module k has no position from which to predict the k after it
    assert [row["tokens"] for row in metrics["mtp"].values()] == [59 + 29 - 2, 59 + 29 - 4]


def test_a_deep_prediction_counts_only_where_all_shallower_ones_were_accepted():
    model = drafting_model("always", 2)
    with torch.no_grad():  # module 1 predicts the opposite, module 2 what the trunk predicts
        model.model.layers[2].eh_proj.weight.neg_()
    metrics = evaluate(model, {"validation": tokens_of(60), "test": tokens_of(30)}, META, settings()).metrics()
    assert [row["mtp_acceptance"] for row in metrics["mtp"].values()] == [0.0, 0.0]


def test_the_models_own_score_is_the_same_bit_for_bit_with_and_without_the_modules():
    model, tokens = drafting_model("sometimes"), tokens_of(100)
    with_modules, without = PositionLoss.zeros(16), PositionLoss.zeros(16)
    nats = score_split(model, tokens, settings(), with_modules, acceptance=MTPAcceptance(model))
    assert nats == score_split(model, tokens, settings(), without)
    assert (with_modules.nats_S == without.nats_S).all()


def test_a_model_without_mtp_modules_has_no_such_numbers_and_computes_nothing_more():
    model = drafting_model("sometimes", 0)
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    streams = {"validation": tokens_of(60), "test": tokens_of(30)}
    assert list(evaluate(model, streams, META, settings()).metrics()) == ["validation", "test", "heldout", "router"]
    batches = [-(-len(list(sliding_windows(len(tokens), 16, 6))) // 4) for tokens in streams.values()]
    assert len(calls) == sum(batches)

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.evaluation.expert_load import ExpertLoad, router_summary
from dsv3.evaluation.sliding_window import PositionLoss, check_fits, evaluate, score_split, sliding_windows
from dsv3.params.evaluate import EvaluateParams
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.training_inputs import MICRO


@pytest.fixture(scope="module")
def model() -> DeepseekV3ForCausalLM:
    torch.manual_seed(1)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**MICRO, "initializer_range": 0.3})).eval()


def tokens_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 272, count).astype(np.uint16)


def settings(**changes) -> EvaluateParams:
    defaults = {"per_device_eval_batch_size": 4, "block_size": 16, "stride": 6, "cross_document_attention": True}
    return EvaluateParams(**{**defaults, **changes})


@given(st.integers(0, 300), st.integers(2, 40), st.data())
def test_every_token_but_the_first_is_scored_once_with_enough_context(num_tokens, block_size, data):
    stride = data.draw(st.integers(1, block_size))
    scored = []
    for window in sliding_windows(num_tokens, block_size, stride):
        last = window.start + window.length
        targets = range(last - window.num_scored + 1, last + 1)
        scored += targets
        assert window.start >= 0
        assert window.length <= block_size
        assert last < num_tokens
        for target in targets:
            assert target - window.start >= min(target, block_size - stride)
    assert scored == list(range(1, num_tokens))


@given(st.integers(2, 300), st.integers(2, 40))
def test_all_windows_of_a_split_are_equally_long_so_nothing_is_padded(num_tokens, block_size):
    assert len({window.length for window in sliding_windows(num_tokens, block_size, max(1, block_size // 2))}) == 1


@pytest.mark.parametrize("num_tokens", [2, 10, 17, 18, 100])
def test_the_score_is_that_of_one_window_at_a_time(model, num_tokens):
    params, tokens, positions = settings(), tokens_of(num_tokens), PositionLoss.zeros(16)
    reported = []
    nats = score_split(model, tokens, params, positions, reported.append)
    expected = 0.0
    for window in sliding_windows(num_tokens, 16, 6):
        ids = torch.tensor(tokens[window.start : window.start + window.length + 1].astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None, :-1]).logits[0]
        losses = F.cross_entropy(logits, ids[1:], reduction="none")
        expected += losses[-window.num_scored :].double().sum().item()
    # fp32 logits of batches of another size round differently
    assert nats == pytest.approx(expected, rel=1e-6)
    assert sum(reported) == num_tokens - 1


@pytest.mark.parametrize("does_cross", [False, True])
def test_documents_that_do_not_attend_to_one_another_are_scored_as_if_each_stood_alone(model, does_cross):
    params, tokens = settings(cross_document_attention=does_cross), tokens_of(60)
    tokens[[0, 5, 6, 21, 40]] = 0  # the second document is empty
    splits = {"validation": {"characters": 100, "bytes": 100}}
    evaluation = evaluate(model, {"validation": tokens}, {"splits": splits, "bos_token_id": 0}, params)
    expected = 0.0
    for window in sliding_windows(60, 16, 6):
        for target in range(window.start + window.length - window.num_scored + 1, window.start + window.length + 1):
            begins = np.flatnonzero(tokens[:target] == 0)[-1]  # of the document whose tokens predict the target
            known = tokens[window.start if does_cross else max(window.start, begins) : target].astype(np.int64)
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(known)[None]).logits[0, -1]
            expected -= logits.log_softmax(-1)[int(tokens[target])].double().item()
    # fp32 logits of batches of another size round differently
    assert evaluation.scores["heldout"].nats == pytest.approx(expected, rel=1e-6)


def test_the_score_is_the_same_every_time_and_nearly_so_in_other_batches(model):
    scores = [
        score_split(model, tokens_of(200), settings(per_device_eval_batch_size=size), PositionLoss.zeros(16))
        for size in (4, 4, 1, 7)
    ]
    assert scores[0] == scores[1]
    assert scores == pytest.approx([scores[0]] * 4, rel=1e-6)  # fp32 logits, batches of another size


def test_a_model_with_equal_logits_scores_the_logarithm_of_the_vocabulary(model):
    zero = DeepseekV3ForCausalLM(DeepseekV3Config(**MICRO)).eval()
    torch.nn.init.zeros_(zero.lm_head.weight)
    positions = PositionLoss.zeros(16)
    nats = score_split(zero, tokens_of(50), settings(), positions)
    assert nats / 49 == pytest.approx(math.log(272), rel=1e-6)
    assert positions.means() == pytest.approx([math.log(272)] * 16, rel=1e-6)


def test_an_evaluation_holds_every_number_of_the_metrics_file(model):
    streams = {"validation": tokens_of(60), "test": tokens_of(30)}
    sizes = {"validation": {"characters": 200, "bytes": 210}, "test": {"characters": 100, "bytes": 100}}
    evaluation = evaluate(model, streams, {"splits": sizes, "bos_token_id": 0}, settings())
    metrics = evaluation.metrics()
    assert list(metrics) == ["validation", "test", "heldout", "router", "mtp"]
    assert metrics["heldout"]["tokens"] == 59 + 29
    assert metrics["heldout"]["nats_per_char"] == pytest.approx(
        (metrics["validation"]["nats_per_char"] * 200 + metrics["test"]["nats_per_char"] * 100) / 300
    )
    assert metrics["router"]["num_layers"] == 2  # layer 0 is dense; layer 2 is the MTP module
    lines = evaluation.position_table().splitlines()
    assert lines[0].split("\t") == ["position", "loss", "tokens"]
    assert len(lines) == 17
    shares = [float(line.split("\t")[2]) for line in evaluation.load_table().splitlines()[1:]]
    assert len(shares) == 8
    assert sum(shares) == pytest.approx(2.0)


def test_loads_count_each_token_of_each_window_top_k_times_and_nothing_outside_the_block(model):
    with ExpertLoad(model) as load:
        score_split(model, tokens_of(100), settings(), PositionLoss.zeros(16))
    num_routed = sum(window.length for window in sliding_windows(100, 16, 6))
    assert {layer: counts.sum() for layer, counts in load.counts.items()} == {1: num_routed * 2}
    before = {layer: router.expert_load.clone() for layer, router in model.routers()}
    score_split(model, tokens_of(100), settings(), PositionLoss.zeros(16))
    assert all(torch.equal(before[layer], router.expert_load) for layer, router in model.routers())


def test_router_metrics_say_how_uneven_the_loads_are():
    counts = {1: np.array([4.0, 4.0, 4.0, 4.0]), 3: np.array([6.0, 2.0, 0.0, 0.0])}
    assert router_summary(counts) == {
        "max_vio_global_mean": 1.0,
        "max_vio_global_max": 2.0,
        "entropy_mean": pytest.approx((math.log(4) - 0.75 * math.log(0.75) - 0.25 * math.log(0.25)) / 2),
        "dead_experts": 2,
        "num_layers": 2,
    }
    assert router_summary({}) == {}


@pytest.mark.parametrize(
    ("vocab_size", "tokens", "block_size", "message"),
    [
        (273, 10, 16, "vocabulary of 273; must be <= 272"),
        (272, 1, 16, r"test has no tokens; raise tokenize\.test_fraction"),
        (272, 10, 65, r"evaluate\.block_size is 65; must be <= 64"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_in_one_line(vocab_size, tokens, block_size, message):
    model = SimpleNamespace(config=DeepseekV3Config(**MICRO))
    meta = {"vocab_size": vocab_size, "splits": {"validation": {"tokens": 10}, "test": {"tokens": tokens}}}
    with pytest.raises(UserError, match=message):
        check_fits(model, meta, settings(block_size=block_size))  # pyright: ignore

import math

import pytest

from dsv3.scores import SCORES, SplitScore


def test_sums_add_up_over_splits_and_each_score_has_its_unit():
    one, two = SplitScore(100.0, 40, 80, 160), SplitScore(50.0, 10, 20, 40)
    assert (one + two).metrics() == {
        "nats_per_token": 150 / 50,
        "perplexity": pytest.approx(math.exp(3.0)),
        "nats_per_char": 150 / 100,
        "bits_per_byte": pytest.approx(150 / math.log(2) / 200),
        "tokens": 50,
        "characters": 100,
        "bytes": 200,
    }


def test_every_score_says_what_it_is():
    assert all(score.description for score in SCORES.values())


def test_a_loss_beyond_what_an_exponential_can_be_of_has_a_perplexity():
    assert SplitScore(2000.0, 1, 1, 1).metrics()["perplexity"] == math.exp(700)

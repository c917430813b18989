import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.evaluation.load_balance import load_entropy, max_vio, num_dead_experts


def test_an_uneven_load_is_measured_layer_by_layer():
    load = torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2], [8, 0, 0, 0]])
    assert max_vio(load).tolist() == [2.0, 0.0, 3.0]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert load_entropy(load).tolist() == pytest.approx([entropy, math.log(4), 0.0])
    assert num_dead_experts(load).tolist() == [2, 0, 3]


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=16))
def test_a_balanced_layer_has_no_violation_and_the_largest_entropy(load):
    num_experts = len(load)
    level, drawn = torch.full((1, num_experts), 7), torch.tensor([load])
    assert max_vio(level).item() == 0
    assert load_entropy(level).item() == pytest.approx(math.log(num_experts))
    assert 0 <= max_vio(drawn).item() <= num_experts - 1
    assert load_entropy(drawn).item() <= math.log(num_experts) + 1e-12

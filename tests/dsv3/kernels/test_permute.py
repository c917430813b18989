import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.kernels.permute import expert_groups


@given(loads=st.lists(st.integers(0, 9), min_size=1, max_size=12), num_rows=st.integers(0, 30))
def test_groups_of_experts_hold_every_row_in_its_order_and_no_more_experts_than_the_rows_asked_for(loads, num_rows):
    taken = list(expert_groups(torch.tensor(loads).cumsum(0).int(), num_rows))
    places = [
        (expert, rows.start + row)
        for rows, parts in taken
        for expert, part in parts
        for row in range(part.start, part.stop)
    ]
    experts = [expert for expert, load in enumerate(loads) for _ in range(load)]
    assert places == list(zip(experts, range(len(experts)), strict=True))
    for rows, parts in taken:
        lengths = [part.stop - part.start for _, part in parts]
        assert min(lengths) > 0
        assert sum(lengths) == rows.stop - rows.start
        assert sum(lengths[:-1]) < max(num_rows, 1)
    assert all(rows.stop - rows.start >= num_rows for rows, _ in taken[:-1])

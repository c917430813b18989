import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.batches import Batches, StepLayout, document_positions, micro_batches
from dsv3.data.shards import TokenStream, write_shards
from dsv3.errors import UserError


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokens")
    dtype = np.dtype("<u2")
    write_shards(directory, "train", [np.arange(103, dtype=dtype)], dtype, 40)
    return TokenStream(sorted(directory.glob("train_*.bin")))


def test_a_sequence_is_a_run_of_neighbouring_tokens_and_the_end_goes_on_at_the_beginning(stream):
    tokens_NL = Batches(stream, block_size=10, seed=3).sequences(0, 50)
    assert tokens_NL.shape == (50, 11)
    assert tokens_NL.dtype == torch.int64
    assert torch.equal((tokens_NL[:, :-1] + 1) % 103, tokens_NL[:, 1:])


def test_an_epoch_visits_every_block_once_and_the_next_in_another_order_with_other_borders(stream):
    batches = Batches(stream, block_size=10, seed=3)
    assert batches.num_blocks_per_epoch == 10
    epochs = [batches.sequences(epoch * 10, 10) for epoch in range(4)]
    for epoch in epochs:
        predicted = epoch[:, 1:].flatten().tolist()
        assert len(set(predicted)) == 100
    assert len({int(epoch[0, 0]) for epoch in epochs}) > 1
    assert len({tuple(sorted((epoch[:, 0] % 103).tolist())) for epoch in epochs}) == 4


def test_the_order_never_changes_from_one_release_of_numpy_to_the_next(stream):
    first = Batches(stream, block_size=10, seed=1337).sequences(0, 6)[:, 0]
    assert first.tolist() == [50, 0, 63, 10, 20, 30]


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 60), count=st.integers(1, 25), seed=st.integers(0, 2**63))
def test_any_span_of_sequences_is_the_same_span_of_the_whole_run(stream, first, count, seed):
    batches = Batches(stream, block_size=8, seed=seed)
    whole = batches.sequences(0, first + count)
    assert torch.equal(batches.sequences(first, count), whole[first:])


def test_another_seed_gives_another_order(stream):
    assert not torch.equal(Batches(stream, 10, 1).sequences(0, 10), Batches(stream, 10, 2).sequences(0, 10))


def test_a_block_as_long_as_the_text_is_refused_in_one_line(stream):
    Batches(stream, block_size=102, seed=0).sequences(0, 3)
    with pytest.raises(UserError, match=r"train.block_size is 103; must be < 103"):
        Batches(stream, block_size=103, seed=0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_together_see_the_sequences_that_one_process_sees(stream, world_size):
    batches = Batches(stream, block_size=10, seed=5)
    seen = []
    for rank in range(world_size):
        layout = StepLayout(3, range(0, 20, 4), rank, world_size)
        seen.append(list(micro_batches(batches, layout, range(2, 4))))
    together = torch.stack([micro for steps in zip(*seen, strict=True) for micro in steps])
    assert torch.equal(together.reshape(24, 11), batches.sequences(24, 24))


def test_starting_at_a_later_step_gives_the_rest_of_the_same_run(stream):
    batches, layout = Batches(stream, block_size=10, seed=5), StepLayout(2, range(0, 14, 2))
    whole = list(micro_batches(batches, layout, range(6)))
    rest = list(micro_batches(batches, layout, range(4, 6)))
    assert len(whole) == 12
    assert all(torch.equal(a, b) for a, b in zip(whole[8:], rest, strict=True))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns where torch has threads
def test_worker_processes_change_nothing_and_the_global_random_state_stays(stream):
    batches, layout = Batches(stream, block_size=10, seed=5), StepLayout(2, range(0, 14, 2))
    state = torch.get_rng_state()
    alone = list(micro_batches(batches, layout, range(3), num_workers=0, pin_memory=True))
    helped = list(micro_batches(batches, layout, range(3), num_workers=2))
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_of_different_sizes_take_the_sequences_one_after_another(stream, world_size):
    batches, starts = Batches(stream, block_size=10, seed=5), [0, 2, 6, 12]
    layouts = [StepLayout(3, starts, rank, world_size) for rank in range(world_size)]
    seen = [list(micro_batches(batches, layout, range(3))) for layout in layouts]
    together = torch.stack([micro for steps in zip(*seen, strict=True) for micro in steps])
    assert torch.equal(together.reshape(36, 11), batches.sequences(0, 36))
    assert [layouts[0].accumulation(step) for step in range(3)] == [2, 4, 6]


def test_a_tokens_position_is_counted_from_the_beginning_of_its_document():
    tokens_BS = torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 1, 2, 3, 4, 5, 6]])
    assert document_positions(tokens_BS, bos_token_id=0).tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6]]

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.shards import TokenStream, write_shards
from dsv3.training.validation import block_batches, read_blocks, summed_loss
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.training_inputs import MICRO


@given(num_tokens=st.integers(2, 400), block_size=st.integers(1, 40), batch_size=st.integers(1, 9))
def test_blocks_predict_every_token_but_the_first_once(num_tokens, block_size, batch_size):
    predicted = [
        batch.start + block * batch.length + position + 1
        for batch in block_batches(num_tokens, block_size, batch_size)
        for block in range(batch.num_blocks)
        for position in range(batch.length)
    ]
    assert predicted == list(range(1, num_tokens))


@settings(max_examples=10, deadline=None)
@given(batch_size=st.integers(1, 5), num_tokens=st.integers(30, 60))
def test_the_loss_is_the_sum_over_tokens_whatever_the_batches(tmp_path_factory, batch_size, num_tokens):
    folder = tmp_path_factory.mktemp("tokens")
    tokens = np.random.default_rng(0).integers(0, 272, num_tokens, np.uint16)
    write_shards(folder, "validation", [tokens], np.dtype("<u2"), 25)
    stream = TokenStream(sorted(folder.glob("validation_*.bin")))
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**MICRO, "initializer_range": 0.5})).eval()
    expected = 0.0
    for batch in block_batches(num_tokens, 8, 1):
        row = read_blocks(stream, batch)
        logits = model(input_ids=row[:, :-1]).logits
        expected += torch.nn.functional.cross_entropy(logits[0], row[0, 1:], reduction="sum").item()
    actual = summed_loss(model, stream, block_batches(num_tokens, 8, batch_size), torch.device("cpu"))
    # Batches of other sizes multiply in another order: fp32 sums of some 50 losses near 6.
    np.testing.assert_allclose(actual, expected, rtol=1e-5)

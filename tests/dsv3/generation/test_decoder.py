"""The decoder against the model: one layer written twice, so every form of the first is asked of the second."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

from dsv3.generation import decoder
from dsv3.generation.decoder import CHUNK, Decoder, is_decodable, threads_for
from dsv3.generation.sampling import generate, generation_config
from dsv3.generation.speculative import generate_speculatively
from dsv3.params.sample import SampleParams
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.drafting_model import YARN, drafting_model
from tests.training_inputs import MICRO

FORMS = {
    "as shipped": {},
    "compressed queries": {"q_lora_rank": 12},
    "biases": {"attention_bias": True},
    "compressed queries, biases": {"q_lora_rank": 12, "attention_bias": True},
    "halves rotated": {"rope_interleave": False},
    "yarn": {"rope_parameters": YARN},
    "no shared expert": {"n_shared_experts": 0},
    "dense": {"first_k_dense_replace": 9},
    "experts alone": {"first_k_dense_replace": 0},
    "tied": {"tie_word_embeddings": True},
    "gates as they are": {"norm_topk_prob": False},
}
LENGTH = CHUNK + 20
NO_END = -1


def built(**changes) -> DeepseekV3ForCausalLM:
    """A model whose biases of routers and projections are no zeros."""
    torch.manual_seed(1)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**MICRO, "initializer_range": 0.3, **changes})).eval()
    with torch.no_grad():
        for _, router in model.routers():
            router.e_score_correction_bias.normal_(std=0.1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def settings(**changes) -> SampleParams:
    defaults = {"prompts": [""], "max_new_tokens": 60, "temperature": 0.8, "top_k": 0, "top_p": 0.9}
    return SampleParams(**{**defaults, "num_return_sequences": 1, "speculative": False, **changes})


@torch.inference_mode()
@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_logits_are_the_models_however_many_tokens_are_read_at_once(changes):
    model = built(**changes)
    assert is_decodable(model)
    tokens = torch.randint(model.config.vocab_size, (LENGTH,)).tolist()
    decoder = Decoder(model, LENGTH)
    decoder.read([*tokens[:3], 7, 7, 7])
    decoder.length = 3  # what is forgotten is written over
    sizes = [1, 2, 3, 5, LENGTH - 3 - 11 - 1, 1]
    borders = [3 + sum(sizes[:n]) for n in range(len(sizes) + 1)]
    states = [decoder.read(tokens[first:last]) for first, last in pairwise(borders)]
    assert decoder.length == LENGTH
    expected = model(input_ids=torch.tensor([tokens])).logits[0, 3:]
    # fp32; sums of some tens of products in another order, through a few layers.
    torch.testing.assert_close(decoder.logits(torch.cat(states)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{"do_sample": False}, {"do_sample": True, "top_k": 40}, {"do_sample": True}])
def test_tokens_are_those_that_transformers_draws_with_the_same_seed(changes):
    model = built()
    params = settings(**changes)
    for seed in range(3):
        torch.manual_seed(seed)
        found = generate(model, [1, 2, 3], params, NO_END)
        torch.manual_seed(seed)
        prompt = torch.tensor([[1, 2, 3]])
        config = generation_config(params, None)
        config.eos_token_id, config.pad_token_id = model.config.vocab_size, 0  # no end
        theirs = model.generate(prompt, generation_config=config, attention_mask=torch.ones_like(prompt))
        assert found == theirs[:, 3:].tolist()


def in_training(model):
    model.train()


def with_hook(model):
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: None)


def with_adapter(model):
    model.model.layers[0].self_attn.o_proj = nn.Sequential(model.model.layers[0].self_attn.o_proj)


def with_own_forward(model):
    model.model.layers[0].mlp.down_proj.forward = lambda x: x


def in_bf16(model):
    model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [in_training, with_hook, with_adapter, with_own_forward, in_bf16])
def test_a_model_that_computes_something_else_is_left_to_transformers(change):
    model = built()
    change(model)
    assert not is_decodable(model)


def test_positions_that_depend_on_the_length_are_left_to_transformers():
    assert not is_decodable(built(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}))


def test_a_small_model_is_read_by_one_thread_and_a_large_one_by_all(monkeypatch):
    """Threads that wait for each other at each small product: 6 tokens/s instead of 160, beside other work."""
    model, before = built(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with threads_for(model):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(decoder, "BYTES_PER_THREAD", sum(weight.nbytes for weight in model.parameters()) // 2)
        with threads_for(model):
            assert torch.get_num_threads() == 2
        monkeypatch.setattr(decoder, "BYTES_PER_THREAD", 1)
        with pytest.raises(ZeroDivisionError), threads_for(model):
            assert torch.get_num_threads() == 3
            raise ZeroDivisionError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_texts_are_written_in_such_a_block():
    """With drafts and without."""
    seen = []

    class Noted(BaseStreamer):
        def put(self, value):
            seen.append(torch.get_num_threads())

        def end(self):
            seen.append("end")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        params = settings(do_sample=False, speculative=False)
        generate(built(), [1, 2, 3], params, NO_END, Noted())
        assert seen == [1] * (params.max_new_tokens + 1) + ["end"]
        seen.clear()
        model = drafting_model("sometimes")
        generate_speculatively(model, [1, 2, 3], params, NO_END, lambda _: seen.append(torch.get_num_threads()))
        assert set(seen) == {1}
    finally:
        torch.set_num_threads(before)

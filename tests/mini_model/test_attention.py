import math

import pytest
import torch
from transformers import StaticCache

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
"""fp32: the absorbed form sums the same products in another order; logits here are of size 1 to 10."""

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def test_no_logit_depends_on_a_later_token(micro_model, token_ids):
    model, ids, position = micro_model(), token_ids(), 5
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[:, position].sum().backward()
    assert not embeds.grad[:, position + 1 :].any()
    assert embeds.grad[:, : position + 1].flatten(2).any(dim=2).all()


def test_an_mtp_module_reads_no_token_beyond_the_ones_it_is_given(micro_model, token_ids):
    model, ids, position = micro_model(num_nextn_predict_layers=2), token_ids(), 5
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    hidden = model.model(inputs_embeds=embeds).last_hidden_state
    for depth, state in enumerate(model.model.mtp_hidden_states(hidden, embeds), start=1):
        assert state.shape[1] == ids.shape[1] - depth
        (gradient,) = torch.autograd.grad(state[:, position].sum(), embeds, retain_graph=True)
        assert not gradient[:, position + depth + 1 :].any()
        assert gradient[:, position + depth].any(dim=1).all()


@pytest.mark.parametrize(
    "overrides", [{}, {"q_lora_rank": None}, {"rope_parameters": YARN}, {"rope_interleave": False}]
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_decoding_token_by_token_equals_reading_all_at_once(micro_model, token_ids, overrides, implementation):
    model, ids = micro_model(**overrides).eval(), token_ids()
    model.set_attn_implementation(implementation)
    expected = model(ids, use_cache=False).logits
    cache, logits = None, []
    for position in range(ids.shape[1]):
        out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **TOLERANCE)


@pytest.mark.parametrize("chunk", [2, 5])
@torch.no_grad()
def test_several_queries_on_a_cache_equal_the_uncached_forward(micro_model, token_ids, chunk):
    model, ids = micro_model().eval(), token_ids()
    expected = model(ids).logits
    prefix = model(ids[:, :-chunk], use_cache=True)
    rest = model(ids[:, -chunk:], past_key_values=prefix.past_key_values)
    torch.testing.assert_close(rest.logits, expected[:, -chunk:], **TOLERANCE)


@torch.no_grad()
def test_the_cache_holds_one_latent_and_one_rotated_key_per_token(micro_model, token_ids):
    cache = micro_model().eval()(token_ids(2, 7), use_cache=True).past_key_values
    assert len(cache.layers) == 3
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 1, 7, 10)] * 3
    assert [tuple(layer.values.shape) for layer in cache.layers] == [(2, 1, 7, 4)] * 3


@torch.no_grad()
def test_a_static_cache_gives_the_same_logits(micro_model, token_ids):
    model, ids = micro_model().eval(), token_ids()
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(ids[:, :-1], past_key_values=cache)
    logits = model(ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits[:, -1:], **TOLERANCE)


@pytest.mark.parametrize("num_keys", [7, 40])
def test_the_absorbed_form_equals_the_expanded_one_and_is_taken_where_it_multiplies_less(micro_model, num_keys):
    attention = micro_model().eval().model.layers[0].self_attn
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, 3, 1, 8), (2, 3, 1, 4), (2, 1, num_keys, 10), (2, 1, num_keys, 4)]
    parts = [torch.randn(shape, generator=generator) for shape in shapes]
    absorbed, _ = attention.attend_absorbed(*parts, None)
    expanded, _ = attention.attend_expanded(*parts, None)
    torch.testing.assert_close(absorbed, expanded, **TOLERANCE)

    def multiplications_per_head_and_key(num_queries):
        latent, expanded_width = 10, 8 + 6
        return num_queries * 2 * latent, latent * expanded_width + num_queries * expanded_width

    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for num_queries in range(1, 40):
        absorbing, expanding = multiplications_per_head_and_key(num_queries)
        assert attention.should_absorb(num_queries, 1000, mask) == (absorbing < expanding)
    assert not attention.should_absorb(40, 40, None)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_tokens_that_are_there(micro_model, token_ids, side):
    model, ids = micro_model().eval(), token_ids(1, 9)
    padding = torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat([padding, ids] if side == "left" else [ids, padding], dim=1)
    mask = torch.cat([padding, ids * 0 + 1] if side == "left" else [ids * 0 + 1, padding], dim=1)
    there = slice(4, None) if side == "left" else slice(0, 9)
    # RoPE is relative, so shifted positions may change nothing either.
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, there], model(ids).logits, **TOLERANCE)


@torch.no_grad()
def test_a_padded_query_on_a_cache_that_attends_to_no_key_changes_no_other(micro_model, token_ids):
    model, ids = micro_model().eval(), token_ids(1, 6)
    padded, mask = torch.cat([ids[:, :3] * 0, ids], dim=1), torch.tensor([[0] * 3 + [1] * 6])
    prefix = model(padded[:, :2], attention_mask=mask[:, :2], use_cache=True)
    rest = model(padded[:, 2:], attention_mask=mask, past_key_values=prefix.past_key_values)
    torch.testing.assert_close(rest.logits[:, 1:], model(ids).logits, **TOLERANCE)


def test_documents_whose_positions_restart_do_not_attend_to_each_other(micro_model, token_ids):
    model, ids = micro_model(num_nextn_predict_layers=1), token_ids(1, 11)
    position_ids = torch.cat([torch.arange(6), torch.arange(5)])[None]
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    packed = model(inputs_embeds=embeds, position_ids=position_ids).logits
    alone = [model(ids[:, :6]).logits, model(ids[:, 6:]).logits]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), **TOLERANCE)
    (gradient,) = torch.autograd.grad(packed[:, 6:].sum(), embeds)
    assert not gradient[:, :6].any()
    # also where losses are evaluated, which must not switch a cache on
    model.eval()
    targets = torch.roll(ids, -1, dims=1)
    together = model(ids, position_ids=position_ids, shift_labels=targets)
    torch.testing.assert_close(together.logits, packed, **TOLERANCE)
    assert together.past_key_values is None


@torch.no_grad()
@pytest.mark.parametrize(
    "strategy", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}], ids=["greedy", "beam"]
)
def test_generation_with_a_cache_equals_generation_without(micro_model, token_ids, strategy):
    model, ids = micro_model().eval(), token_ids(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, **strategy}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    assert cached.shape == (2, 13)


def test_angles_stay_in_fp32_when_the_model_is_cast(micro_model):
    model = micro_model()
    before = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert math.isclose(before[1].item(), 10000**-0.5, rel_tol=1e-6)


@torch.no_grad()
def test_hidden_states_end_after_the_final_norm_and_attentions_are_rows_that_sum_to_one(micro_model, token_ids):
    model, ids = micro_model(num_nextn_predict_layers=1).eval(), token_ids()
    model.set_attn_implementation("eager")
    out = model(ids, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert [logits.shape for logits in out.router_logits] == [(24, 8)] * 2
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 12))

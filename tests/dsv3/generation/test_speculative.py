from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from dsv3.errors import UserError
from dsv3.generation.decoder import Decoder
from dsv3.generation.sampling import Sample, check_fits, generation_config, markdown, sample, total_drafts
from dsv3.generation.speculative import (
    DraftCounts,
    Drafter,
    Reader,
    distribution_of,
    generate_speculatively,
    rejection_sample,
)
from dsv3.params.sample import SampleParams
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.drafting_model import YARN, drafting_model
from tests.training_inputs import MICRO, WORDS

NO_END = -1


def settings(**changes) -> SampleParams:
    defaults = {"prompts": ["To be"], "max_new_tokens": 12, "do_sample": False, "temperature": 0.8, "top_k": 0}
    return SampleParams(**{**defaults, "top_p": 0.95, "num_return_sequences": 1, "speculative": True, **changes})


@pytest.mark.parametrize(("num_modules", "rope", "num_prompts"), [(1, {}, 50), (2, {}, 12), (3, YARN, 12)])
def test_speculative_text_equals_greedy_text_token_by_token(tokenizer, num_modules, rope, num_prompts):
    model = drafting_model("sometimes", num_modules, **({"rope_parameters": rope} if rope else {}))
    counts = DraftCounts()
    prompts = ["", "t", *(f"{first} {second}" for first in WORDS for second in WORDS if first != second)]
    for prompt in prompts[:num_prompts]:
        greedy = sample(model, tokenizer, prompt, settings(speculative=False), seed=1)
        item = sample(model, tokenizer, prompt, settings(), seed=1)
        assert (item.continuations, item.num_new_tokens) == (greedy.continuations, greedy.num_new_tokens)
        assert item.drafts is not None
        counts += item.drafts
    # otherwise accepting and rejecting would not both have been tested
    assert 0.1 < counts.accepted / counts.drafted < 0.9


@pytest.mark.parametrize(
    ("agreement", "num_modules", "max_new_tokens", "expected"),
    [
        # a first pass over the prompt gives 1 token, then a draft more per pass, and none where 1 token is missing
        ("always", 1, 12, DraftCounts(drafted=5, accepted=5, tokens=12, passes=7)),
        ("always", 1, 11, DraftCounts(drafted=5, accepted=5, tokens=11, passes=6)),
        ("always", 3, 12, DraftCounts(drafted=8, accepted=8, tokens=12, passes=4)),
        ("never", 1, 12, DraftCounts(drafted=10, accepted=0, tokens=12, passes=12)),
        ("never", 3, 6, DraftCounts(drafted=3 + 3 + 2 + 1, accepted=0, tokens=6, passes=6)),
        ("always", 1, 1, DraftCounts(drafted=0, accepted=0, tokens=1, passes=1)),
    ],
)
def test_drafts_that_are_always_or_never_accepted_are_counted_so(agreement, num_modules, max_new_tokens, expected):
    model = drafting_model(agreement, num_modules)
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    generated, counts = generate_speculatively(model, [0, 5, 9], settings(max_new_tokens=max_new_tokens), NO_END)
    assert counts == expected
    assert (len(generated), len(passes)) == (counts.tokens, counts.passes)


def test_the_text_ends_at_the_first_end_of_text_even_among_drafts():
    model = drafting_model("always", 3)
    whole, _ = generate_speculatively(model, [0, 5, 9], settings(), NO_END)
    for end_of_text in set(whole):
        generated, counts = generate_speculatively(model, [0, 5, 9], settings(), end_of_text)
        assert generated == whole[: whole.index(end_of_text) + 1]
        assert counts.tokens == len(generated)
        assert counts.accepted <= counts.drafted


@torch.no_grad()
@pytest.mark.parametrize("make", [Reader, lambda model: Decoder(model, 30)], ids=["transformers", "decoder"])
@pytest.mark.parametrize("num_modules", [1, 2, 3])
def test_drafts_from_cached_latents_equal_drafts_from_the_whole_text(num_modules, make):
    torch.manual_seed(3)
    sizes = {**MICRO, "initializer_range": 0.3, "num_nextn_predict_layers": num_modules}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes)).eval()
    drafter = Drafter(make(model), lambda logits: F.one_hot(logits.argmax(dim=-1), 272).float())
    text = torch.randint(272, (1, 20))
    states = model.model(text, use_cache=False).last_hidden_state
    read = 0
    # the trunk reads on by 1 token up to all drafts and one more; the text is never what was drafted
    for num_known in (1, 2, 3, 6, 7, 9, 13, 14, 17):
        drafter.append_states(states[0, read:num_known])
        read = num_known
        tokens = text[:, : num_known + 1]
        expected = tokens
        for depth in range(num_modules):
            trunk = model.model(expected, use_cache=False).last_hidden_state
            ahead = list(islice(model.model.mtp_hidden_states(trunk, model.model.embed_tokens(expected)), depth + 1))
            expected = torch.cat([expected, model.lm_head(ahead[-1][:, -1]).argmax(dim=-1, keepdim=True)], dim=1)
        drafts, _ = drafter.draft(tokens[0].tolist(), max_drafts=num_modules)
        assert drafts == expected[0, num_known + 1 :].tolist()


@pytest.mark.parametrize("num_modules", [1, 2])
def test_transformers_own_loop_generates_the_same_in_as_many_passes(tmp_path, num_modules):
    drafting_model("sometimes", num_modules).save_pretrained(tmp_path)
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    for first in range(1, 5):
        prompt = torch.tensor([[0, first, 100 + first]])
        theirs = generation_config(settings(), None)
        expected = model.generate(prompt, generation_config=theirs, use_mtp=True, attention_mask=torch.ones(1, 3))
        generated, counts = generate_speculatively(model, prompt[0].tolist(), settings(), NO_END)
        assert generated == expected[0, 3:].tolist()
        assert counts.passes == len(passes)
        passes.clear()


@pytest.mark.parametrize("num_drafts", [1, 2])
def test_accepted_tokens_are_distributed_as_the_trunks_own_draws(num_drafts):
    num_tokens, num_draws = 4, 3000
    p = torch.randn(num_drafts + 1, num_tokens).softmax(dim=-1)
    q = torch.randn(num_drafts, num_tokens).softmax(dim=-1)
    found = torch.zeros(num_drafts + 1, num_tokens)
    reached = torch.zeros(num_drafts + 1)
    for _ in range(num_draws):
        accepted = rejection_sample(torch.multinomial(q, 1)[:, 0].tolist(), list(q), p)
        found[torch.arange(len(accepted)), accepted] += 1
        reached[: len(accepted)] += 1
    assert reached[0] == num_draws
    assert (reached[1:] > 300).all()
    # At the first place all draws; at a later one those that got there. 4 standard errors of a share.
    error = (p * (1 - p) / reached[:, None]).sqrt()
    assert ((found / reached[:, None] - p).abs() < 4 * error).all()


def test_equal_distributions_accept_every_draft():
    p = torch.randn(3, 7).softmax(dim=-1)
    for _ in range(100):
        draft = torch.multinomial(p[:2], 1)[:, 0].tolist()
        assert rejection_sample(draft, list(p[:2]), p)[:2] == draft


@pytest.mark.parametrize(
    "changes",
    [{"do_sample": True}, {"do_sample": True, "top_k": 7, "temperature": 1.3}, {"do_sample": True, "top_p": 1}],
)
def test_tokens_are_drawn_from_what_transformers_would_draw_from(changes):
    model, params = drafting_model("sometimes"), settings(**changes)
    prompt = torch.tensor([[0, 5, 9]])
    config = generation_config(params, None)
    config.update(return_dict_in_generate=True, output_scores=True)
    scores = model.generate(prompt, generation_config=config, attention_mask=torch.ones_like(prompt)).scores[0]
    with torch.no_grad():
        logits = model(prompt).logits[:, -1]
    # fp32; a pass with a cache may round differently
    torch.testing.assert_close(distribution_of(params)(logits), scores.softmax(dim=-1), rtol=1e-5, atol=1e-7)


def test_sampling_from_one_token_is_greedy(tokenizer):
    model = drafting_model("sometimes", 2)
    greedy = sample(model, tokenizer, "To be", settings(), seed=1)
    assert sample(model, tokenizer, "To be", settings(do_sample=True, top_k=1), seed=5) == greedy


def test_the_same_seed_gives_the_same_continuations_and_each_differs(tokenizer):
    model, params = drafting_model("sometimes"), settings(do_sample=True, num_return_sequences=3)
    one, two, other = (sample(model, tokenizer, "To be", params, seed) for seed in (1, 1, 2))
    assert one == two != other
    assert len(set(one.continuations)) == 3


def test_counts_add_up_and_give_ratios():
    counts = DraftCounts(10, 4, 15, 11) + DraftCounts(10, 5, 15, 9)
    assert counts.metrics() == {"draft_acceptance": 9 / 20, "tokens_per_pass": 30 / 20}
    assert str(counts) == "9 of 20 drafts accepted (45.0%), 1.50 tokens per forward pass"
    assert DraftCounts(0, 0, 1, 1).metrics() == {"tokens_per_pass": 1.0}


def test_the_page_counts_the_drafts_only_where_there_were_any():
    record = {"name": "union-brig", "experiment": "config_nano", "dvc": {}}
    samples = [Sample("a", ("b",), 15, DraftCounts(10, 4, 15, 11)), Sample("c", ("d",), 15, DraftCounts(10, 5, 15, 9))]
    page = markdown(samples, settings(), 1337, record)
    assert "| speculation | 9 of 20 drafts accepted (45.0%), 1.50 tokens per forward pass |" in page
    plain = [Sample("a", ("b",), 15)]
    assert total_drafts(plain) is None
    assert "speculation" not in markdown(plain, settings(speculative=False), 1337, record)


def test_a_model_without_prediction_modules_is_refused_in_one_line(tokenizer):
    model = drafting_model("sometimes", 0)
    message = r"sample\.speculative is true; needs a model with MTP modules.* is 0; .*set sample\.speculative to"
    with pytest.raises(UserError, match=message):
        check_fits(model, tokenizer, settings())
    check_fits(model, tokenizer, settings(speculative=False))

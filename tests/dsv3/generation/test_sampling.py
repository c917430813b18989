import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dsv3.artifacts import write_json
from dsv3.data.encoding import Encoder, Piece
from dsv3.data.tokenizer import copy_pretrained, save_trained, train_tokenizer
from dsv3.errors import UserError
from dsv3.generation.sampling import Sample, check_fits, generation_config, markdown, prompt_tokens, sample
from dsv3.params.sample import SampleParams
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.training_inputs import MICRO

RECORD = {
    "name": "union-brig",
    "experiment": "config_nano",
    "dvc": {"git_sha": "0123456789abcdef", "git_dirty": True, "data_source": "plays"},
}


@pytest.fixture(scope="module")
def model() -> DeepseekV3ForCausalLM:
    torch.manual_seed(1)
    config = DeepseekV3Config(**{**MICRO, "initializer_range": 0.3, "vocab_size": 257})
    return DeepseekV3ForCausalLM(config).eval()


def settings(**changes) -> SampleParams:
    defaults = {"prompts": ["To be"], "max_new_tokens": 12, "do_sample": True, "temperature": 0.8}
    return SampleParams(
        **{**defaults, "top_k": 0, "top_p": 0.95, "num_return_sequences": 1, "speculative": False, **changes}
    )


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model, tokenizer):
    texts = [sample(model, tokenizer, "To be", settings(), seed).continuations for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_ignores_the_seed_and_takes_the_most_probable_token(model, tokenizer):
    item = sample(model, tokenizer, "To be", settings(do_sample=False, max_new_tokens=4), seed=1)
    assert item == sample(model, tokenizer, "To be", settings(do_sample=False, max_new_tokens=4), seed=2)
    ids = [0, *tokenizer.encode("To be")]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert item.continuations == (tokenizer.decode(ids[6:], skip_special_tokens=True),)


def test_a_prompt_begins_as_a_document_does_in_the_shards(tmp_path):
    trained = train_tokenizer(["To be, or not to be"], 260)
    trained.add_special_tokens(["<bos>"])
    for bos in ({"bos_token": "<bos>"}, {}):
        source, copy = tmp_path / f"source{len(bos)}", tmp_path / f"copy{len(bos)}"
        save_trained(trained, source)
        write_json(source / "tokenizer_config.json", {"eos_token": "<|endoftext|>", **bos})
        copy_pretrained(str(source), copy)
        encoded = Encoder(copy, np.dtype("<u2")).encode([Piece("To be", opens=True, closes=False)])
        assert prompt_tokens(AutoTokenizer.from_pretrained(copy), "To be") == encoded.tokens.tolist()
        assert encoded.tokens[0] == (trained.token_to_id("<bos>") if bos else 0)


def test_top_k_of_one_is_greedy(model, tokenizer):
    greedy = sample(model, tokenizer, "To be", settings(do_sample=False), seed=1)
    assert sample(model, tokenizer, "To be", settings(top_k=1), seed=5).continuations == greedy.continuations


def test_each_prompt_gets_as_many_continuations_as_asked(model, tokenizer):
    item = sample(model, tokenizer, "To be", settings(num_return_sequences=3), seed=1)
    assert len(set(item.continuations)) == 3
    assert item.num_new_tokens <= 36


def test_sampling_settings_are_absent_from_greedy_decoding():
    assert generation_config(settings(do_sample=False), 0).temperature is None
    config = generation_config(settings(top_k=7), 0)
    assert (config.temperature, config.top_k, config.top_p) == (0.8, 7, 0.95)


def test_a_text_longer_than_the_model_can_hold_is_refused(model, tokenizer):
    with pytest.raises(UserError, match=r"sample\.max_new_tokens is 60; must be <= 58"):
        check_fits(model, tokenizer, settings(max_new_tokens=60))
    check_fits(model, tokenizer, settings(max_new_tokens=58))


def test_the_page_names_model_settings_and_quotes_the_text_unchanged():
    samples = [Sample("ROMEO:\n", ("But *soft*\n\n", "```"), 5)]
    page = markdown(samples, settings(), 1337, RECORD)
    assert "| run | union-brig (config_nano) |" in page
    assert "| commit | 0123456789ab with changes |" in page
    assert "| decoding | temperature 0.8, top-p 0.95, no top-k |" in page
    assert "## `ROMEO:` (1 of 2)\n\n```text\nROMEO:\nBut *soft*\n```\n" in page
    assert "````text\nROMEO:\n```\n````\n" in page

import pytest
from huggingface_hub import ModelCard
from ruamel.yaml import YAML

from dsv3.data.plays import LICENSE
from dsv3.export.model_card import INITIAL_WEIGHTS, model_card
from dsv3.markdown import one_line
from tests.dsv3.test_markdown import HOSTILE, read

FACTS = {"configuration": "mini_model/config_nano.json", "optimizer steps": 677, "commit": "0123abc"}
SCORES = {"step": 677, "loss": 3.66264905, "perplexity": 38.964425, "nats_per_char": 1.41366324}

PLAYS = {
    "source": "plays",
    "origin": {},
    "license": LICENSE,
    "title": "nine plays of Shakespeare",
    "language": "en",
    "prompt": "ROMEO:",
}
OTHER = {"license": None, "title": "of others", "language": None, "prompt": None}


def read_card(facts=FACTS, **manifest):
    text = model_card(facts, SCORES, {**PLAYS, **manifest})
    return ModelCard(text), text


def test_the_hub_reads_licence_language_and_scores():
    card, _ = read_card()
    assert (card.data.license, card.data.language, card.data.library_name) == ("mit", "en", "transformers")
    found = {(score.metric_name, score.metric_type, score.metric_value) for score in card.data.eval_results}
    assert found == {
        ("nats per token", "loss", 3.66264905),
        ("perplexity", "perplexity", 38.964425),
        ("nats per character", "loss", 1.41366324),
    }
    assert {score.dataset_split for score in card.data.eval_results} == {"validation"}


def test_the_metadata_is_a_model_index():
    _, text = read_card()
    (entry,) = YAML(typ="safe").load(text.split("---")[1])["model-index"]
    assert entry["results"][0]["task"] == {"type": "text-generation"}
    assert entry["results"][0]["dataset"] == {
        "name": "nine plays of Shakespeare",
        "type": "text",
        "split": "validation",
    }


def test_a_text_in_the_public_domain_binds_nobody():
    card, text = read_card()
    assert card.data.license == "mit"
    assert f"Of the text: {LICENSE}. Code and weights are under the MIT licence." in text


def test_what_a_source_states_of_its_text_is_what_the_card_says():
    card, text = read_card(
        source="new", license="CC BY 4.0", title="Nouvelles", language="fr", prompt='"Ô', origin={"hub_id": "a/b"}
    )
    assert (card.data.license, card.data.language) == ("unknown", "fr")
    assert card.data.to_dict()["datasets"] == ["a/b"]
    assert card.data.eval_results[0].dataset_name == "Nouvelles"
    assert "| text | Nouvelles |" in text
    assert "Of the text: CC BY 4.0. The code is under the MIT licence. This project does not know what follows" in text
    assert r'tokenizer("\"\u00d4", return_tensors' in text


@pytest.mark.parametrize(
    ("manifest", "datasets"),
    [
        ({"source": "file", "origin": {"path": "my_texts"}}, None),
        ({"source": "hub", "origin": {"hub_id": "roneneldan/TinyStories"}}, ["roneneldan/TinyStories"]),
    ],
)
def test_of_a_text_whose_source_states_nothing_nothing_is_claimed(manifest, datasets):
    card, text = read_card(**OTHER | manifest)
    assert card.data.license == "unknown"
    assert card.data.language is None
    assert card.data.to_dict().get("datasets") == datasets
    assert "does not know the terms of the text" in text
    assert 'tokenizer("The", ' in text


def test_a_model_that_began_with_another_models_weights_is_under_unknown_terms():
    card, text = read_card({**FACTS, INITIAL_WEIGHTS: "someone/model"})
    assert (card.data.license, card.data.language) == ("unknown", "en")
    assert "began with the weights of another model" in text


def test_it_says_where_the_scores_come_from():
    _, text = read_card()
    assert "Measured by the training itself when it ended" in text
    assert "results/evaluate/metrics.json" in text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_are_shown_as_they_are(hostile):
    card, _ = read_card({"configuration": hostile}, title=hostile, license=hostile, origin={"hub_id": hostile})
    assert card.data.to_dict()["datasets"] == [hostile]
    page = read(card.text)
    assert set(page.tags) <= {"h1", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "code", "pre"}
    assert page.texts["td"][:4] == ["text", one_line(hostile), "configuration", one_line(hostile)]

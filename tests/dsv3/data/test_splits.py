import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.corpus import Chunk, Measure
from dsv3.data.splits import SPLITS, character_spans, split_of, split_selectors
from dsv3.errors import UserError
from dsv3.params.tokenize import TokenizeParams


def params(split_by="characters", validation_fraction=0.05, test_fraction=0.05):
    return TokenizeParams(
        tokenizer="byte_level_bpe",
        vocab_size=300,
        split_by=split_by,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        shard_tokens=100,
    )


def measure(characters, num_documents=1):
    return Measure("text.txt", num_documents, characters, characters, "")


def test_tiny_shakespeare_is_cut_as_the_hub_cuts_it():
    spans = character_spans(1_115_394, 0.05, 0.05)
    assert [len(spans[split]) for split in SPLITS] == [1_003_854, 55_770, 55_770]


@settings(deadline=None)
@given(characters=st.integers(0, 10**9))
def test_the_default_fractions_round_as_the_hubs_script_does(characters):
    first = int(characters * 0.9)
    second = first + int((characters - first) * 0.5)
    assert list(character_spans(characters, 0.05, 0.05).values()) == [
        range(first),
        range(first, second),
        range(second, characters),
    ]


@settings(deadline=None, max_examples=60)
@given(
    documents=st.lists(st.text(min_size=1), min_size=1).filter(lambda documents: len("".join(documents)) >= 20),
    validation=st.floats(0.05, 0.45),
    test=st.floats(0.05, 0.45),
)
def test_the_three_cuts_joined_are_the_text_and_no_character_is_divided(documents, validation, test):
    chunks = [Chunk(number, text) for number, text in enumerate(documents)]
    text = "".join(documents)
    chosen = split_selectors(measure(len(text)), params("characters", validation, test))
    parts = [list(chosen[split](chunks)) for split in SPLITS]
    assert "".join(chunk.text for part in parts for chunk in part) == text
    assert all(chunk.text for part in parts for chunk in part)
    numbers = [chunk.document for part in parts for chunk in part]
    assert numbers == sorted(numbers)


@settings(deadline=None, max_examples=40)
@given(documents=st.lists(st.text(min_size=1), min_size=3))
def test_every_document_is_dealt_whole_to_one_split_and_equal_ones_to_the_same(documents):
    chunks = [Chunk(number, text) for number, text in enumerate(documents)]
    chosen = split_selectors(measure(100, len(documents)), params("documents", 0.3, 0.3))
    parts = {split: list(chosen[split](chunks)) for split in SPLITS}
    assert sorted(chunk for part in parts.values() for chunk in part) == chunks
    texts = [{chunk.text for chunk in part} for part in parts.values()]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])


def test_the_deal_meets_the_fractions_on_average_and_never_changes():
    drawn = [split_of(f"document {number}", params("documents", 0.1, 0.2)) for number in range(2000)]
    # 5 standard deviations of a binomial share: 5 * sqrt(0.2 * 0.8 / 2000) = 0.045
    assert abs(drawn.count("validation") / 2000 - 0.1) < 0.045
    assert abs(drawn.count("test") / 2000 - 0.2) < 0.045
    assert drawn[:6] == ["test", "train", "train", "test", "train", "test"]


@pytest.mark.parametrize(
    ("split_by", "size", "message"),
    [
        ("characters", measure(5), "the corpus has 5 characters; too few for its validation split"),
        (
            "documents",
            measure(900),
            r"tokenize.split_by is documents; must be characters: there are 1 document",
        ),
    ],
)
def test_an_empty_split_and_a_single_document_are_told_in_one_line(split_by, size, message):
    with pytest.raises(UserError, match=message):
        split_selectors(size, params(split_by))

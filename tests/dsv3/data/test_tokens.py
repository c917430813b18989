import json
import sys

import numpy as np
import pytest

from dsv3.artifacts import sha256_file
from dsv3.data import encoding, tokenizer, tokens
from dsv3.data.corpus import Origin, write_documents, write_manifest, write_single_text
from dsv3.data.meta import open_stream, read_meta
from dsv3.data.tokenizer import read_tokenizer
from dsv3.data.tokens import UPDATES_OF_A_PASS, tokens_summary, write_tokens
from dsv3.errors import UserError
from dsv3.params.tokenize import TokenizeParams
from dsv3.progress import ProgressMode

TEXT = "".join(f"Citizen {number % 17}:\nSpeak, naïve friend, speak {number}!\n\n" for number in range(120))


def params(**changes):
    defaults = {
        "tokenizer": "byte_level_bpe",
        "vocab_size": 280,
        "split_by": "characters",
        "validation_fraction": 0.05,
        "test_fraction": 0.05,
        "shard_tokens": 100,
    }
    return TokenizeParams(**defaults | changes)


@pytest.fixture
def text_corpus(tmp_path):
    directory = tmp_path / "corpus"
    directory.mkdir()
    write_manifest(directory, "file", Origin("file", {}), write_single_text(directory, [TEXT.encode()], "text"))
    return directory


@pytest.fixture
def documents_corpus(tmp_path):
    directory = tmp_path / "documents"
    directory.mkdir()
    documents = [f"Story {number}: once upon a time there was a {number}.\n" for number in range(80)]
    write_manifest(directory, "hub", Origin("hub", {}), write_documents(directory, documents, "stories"))
    return directory


def texts(output):
    """The texts that the shards of each split spell, one per document."""
    reader = read_tokenizer(output / "tokenizer")
    result = {}
    for split in ("train", "validation", "test"):
        ids = open_stream(output, read_meta(output), split)[:]
        assert ids[0] == 0
        documents = np.split(ids, np.flatnonzero(ids == 0))[1:]
        result[split] = [reader.decode(document[1:].tolist()) for document in documents]
    return result


def test_the_shards_spell_the_splits_of_the_text(text_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 100)
    write_tokens(text_corpus, tmp_path / "tokens", params(), vocabulary_limit=280)
    spelt = texts(tmp_path / "tokens")
    assert all(len(documents) == 1 for documents in spelt.values())
    assert "".join(documents[0] for documents in spelt.values()) == TEXT
    assert len(spelt["train"][0]) == int(len(TEXT) * 0.9)
    assert len(list((tmp_path / "tokens").glob("train_*.bin"))) > 1


def test_meta_and_metrics_say_what_was_written(text_corpus, tmp_path):
    metrics = write_tokens(text_corpus, tmp_path / "tokens", params(), vocabulary_limit=280)
    meta = json.loads((tmp_path / "tokens" / "meta.json").read_text())
    train = open_stream(tmp_path / "tokens", read_meta(tmp_path / "tokens"), "train")
    assert meta["vocab_size"] == metrics["vocab_size"] == 280
    assert (meta["bos_token_id"], meta["eos_token_id"], meta["dtype"]) == (0, 0, "uint16")
    assert meta["corpus"]["source"] == "file"
    sizes = meta["splits"]["train"]
    assert sizes["tokens"] == metrics["train"]["tokens"] == len(train)
    assert sizes["characters"] == int(len(TEXT) * 0.9)
    assert sizes["bytes"] == len(TEXT[: sizes["characters"]].encode()) > sizes["characters"]
    assert sizes["shards"] == {path.name: sha256_file(path) for path in train.paths}
    assert metrics["vocabulary_used"] == len(set(train[:].tolist())) / 280
    assert metrics["train"]["characters_per_token"] == sizes["characters"] / sizes["tokens"]
    assert metrics["round_trip_exact"] is True
    json.dumps(metrics, allow_nan=False)


def test_the_tokenizer_is_trained_on_the_training_split_alone(text_corpus, tmp_path):
    write_tokens(text_corpus, tmp_path / "a", params(), vocabulary_limit=280)
    changed = TEXT[: int(len(TEXT) * 0.9)] + "z" * (len(TEXT) - int(len(TEXT) * 0.9))
    write_manifest(text_corpus, "file", Origin("file", {}), write_single_text(text_corpus, [changed.encode()], "text"))
    write_tokens(text_corpus, tmp_path / "b", params(), vocabulary_limit=280)
    metas = [json.loads((tmp_path / name / "meta.json").read_text()) for name in "ab"]
    assert metas[0]["tokenizer_sha256"] == metas[1]["tokenizer_sha256"]
    assert metas[0]["sha256"] != metas[1]["sha256"]


def test_running_again_gives_the_same_files_byte_by_byte(text_corpus, tmp_path):
    for name in "ab":
        write_tokens(text_corpus, tmp_path / name, params(), vocabulary_limit=280)
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert len(files) > 5
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


@pytest.mark.parametrize("split_by", ["documents", "characters"])
def test_each_document_stands_alone(documents_corpus, tmp_path, split_by):
    chosen = params(split_by=split_by, validation_fraction=0.2, test_fraction=0.2)
    write_tokens(documents_corpus, tmp_path / "tokens", chosen, vocabulary_limit=280)
    spelt = texts(tmp_path / "tokens")
    documents = [document for split in spelt.values() for document in split]
    assert sorted("".join(documents)) == sorted(
        "".join(f"Story {number}: once upon a time there was a {number}.\n" for number in range(80))
    )
    if split_by == "documents":
        assert len(documents) == 80
        assert all(document.startswith("Story ") and document.endswith(".\n") for document in documents)


def test_several_processes_write_the_same_shards(text_corpus, tmp_path, monkeypatch):
    write_tokens(text_corpus, tmp_path / "alone", params(), vocabulary_limit=280)
    monkeypatch.setattr(tokens, "ONE_PROCESS_CHARACTERS", 0)
    monkeypatch.setattr(tokens.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    write_tokens(text_corpus, tmp_path / "together", params(), vocabulary_limit=280)
    metas = [(tmp_path / name / "meta.json").read_text() for name in ("alone", "together")]
    assert metas[0] == metas[1]


def test_another_tokenizer_is_taken_from_its_folder(text_corpus, tmp_path):
    write_tokens(text_corpus, tmp_path / "a", params(), vocabulary_limit=280)
    name = str(tmp_path / "a" / "tokenizer")
    write_tokens(text_corpus, tmp_path / "b", params(tokenizer=name), vocabulary_limit=280)
    metas = [json.loads((tmp_path / name / "meta.json").read_text()) for name in "ab"]
    assert metas[0] == metas[1]


def test_a_vocabulary_larger_than_the_models_leaves_nothing_behind(text_corpus, tmp_path):
    with pytest.raises(UserError, match="with 280 tokens; must be <= 279, the model's vocab_size"):
        write_tokens(text_corpus, tmp_path / "tokens", params(), vocabulary_limit=279)
    assert {path.name for path in tmp_path.iterdir()} == {"corpus"}


def test_a_damaged_corpus_and_an_empty_deal_leave_the_last_result_as_it_was(text_corpus, tmp_path):
    write_tokens(text_corpus, tmp_path / "tokens", params(), vocabulary_limit=280)
    before = (tmp_path / "tokens" / "meta.json").read_text()
    (text_corpus / "text.txt").write_text(TEXT[:-100], encoding="utf-8")
    with pytest.raises(UserError, match="is not the file that its manifest describes"):
        write_tokens(text_corpus, tmp_path / "tokens", params(), vocabulary_limit=280)
    (tmp_path / "few").mkdir()
    few = write_documents(tmp_path / "few", ["one", "two", "three"], "few")
    write_manifest(tmp_path / "few", "file", Origin("file", {}), few)
    with pytest.raises(UserError, match="split is empty: 3 documents are too few to split"):
        write_tokens(tmp_path / "few", tmp_path / "tokens", params(split_by="documents"), vocabulary_limit=280)
    assert (tmp_path / "tokens" / "meta.json").read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "tokens", "few"}


def test_the_summary_says_what_would_be_written_or_what_is_missing(text_corpus, tmp_path):
    assert tokens_summary(text_corpus, params()).endswith(
        "of file, split by characters, encoded by a byte-level BPE of 280 tokens, trained on the training split"
    )
    with pytest.raises(UserError, match="run the download stage"):
        tokens_summary(tmp_path / "nowhere", params())


def test_many_documents_are_no_more_states_than_a_screen_can_show(tmp_path, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    measure = write_documents(corpus, [f"document {number} of many" for number in range(2000)], "made up")
    write_manifest(corpus, "file", Origin("file", {}), measure)
    write_tokens(corpus, tmp_path / "tokens", params(split_by="documents"), 280, ProgressMode.json)
    states = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert 4 * 50 < len(states) <= 4 * (UPDATES_OF_A_PASS + 1)
    assert states[-1]["done"] == states[-1]["total"] == 4 * measure.characters


@pytest.mark.parametrize("mode", ProgressMode)
def test_the_trainers_own_bar_is_for_a_terminal_that_is_to_have_a_bar(text_corpus, tmp_path, monkeypatch, mode):
    shown: list[bool] = []
    trainer = tokenizer.BpeTrainer

    def watched(show_progress: bool, **options: object) -> object:
        shown.append(show_progress)
        return trainer(show_progress=False, **options)

    monkeypatch.setattr(tokenizer, "BpeTrainer", watched)
    for is_terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        write_tokens(text_corpus, tmp_path / "tokens", params(), 280, mode)
    assert shown == [mode in (ProgressMode.auto, ProgressMode.bar), False]

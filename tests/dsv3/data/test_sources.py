import json

import pytest

from dsv3.data import sources
from dsv3.data.corpus import Origin
from dsv3.data.remote import Unreachable
from dsv3.data.sources import SOURCES, source_summary, write_corpus
from dsv3.errors import UserError
from dsv3.params.data import REQUIRED_KEY, DataParams

EXACT = (b"exact", Origin("tiny_shakespeare", {"url": "https://example.org/input.txt"}))
NINE_PLAYS = (b"nine plays", Origin("plays", {"package": "p==1"}, "MIT"))


def params(source, path=None):
    return DataParams(
        source=source,
        path=path,
        text_field="text",
        hub_id="a/b",
        hub_config_name=None,
        hub_revision=None,
        hub_split="train",
        timeout_s=0.5,
    )


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a corpus of stand-in sources; returns its text, its manifest and the notes."""
    monkeypatch.setattr(sources, "fetch_tiny_shakespeare_within", lambda limit_s: EXACT)
    monkeypatch.setattr(sources, "fetch_tiny_shakespeare", lambda timeout_s: EXACT)
    monkeypatch.setattr(sources, "fetch_plays", lambda timeout_s: NINE_PLAYS)

    def write(source):
        notes = []
        write_corpus(params(source), tmp_path / "corpus", notes.append)
        manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
        return (tmp_path / "corpus" / "text.txt").read_bytes(), manifest, notes

    return write


def test_auto_takes_the_exact_text_where_it_can_be_reached_and_says_so(written):
    text, manifest, notes = written("auto")
    assert text == b"exact"
    assert (manifest["source"], manifest["requested_source"]) == ("tiny_shakespeare", "auto")
    assert notes == ["auto: the exact tiny Shakespeare, from https://example.org/input.txt"]


def test_auto_takes_the_plays_elsewhere_and_says_why(written, monkeypatch):
    def unreachable(limit_s):
        raise Unreachable("GitHub: no network")

    monkeypatch.setattr(sources, "fetch_tiny_shakespeare_within", unreachable)
    text, manifest, notes = written("auto")
    assert text == b"nine plays"
    assert (manifest["source"], manifest["requested_source"]) == ("plays", "auto")
    assert len(notes) == 1
    assert "GitHub: no network" in notes[0]


@pytest.mark.parametrize(("source", "expected"), [("tiny_shakespeare", b"exact"), ("plays", b"nine plays")])
def test_a_named_source_is_the_only_one_asked(written, source, expected):
    text, manifest, notes = written(source)
    assert (text, manifest["source"], notes) == (expected, source, [])


def test_a_file_is_recorded_by_its_path(tmp_path):
    (tmp_path / "a.txt").write_text("my text", encoding="utf-8")
    write_corpus(params("file", str(tmp_path / "a.txt")), tmp_path / "corpus", print)
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest["origin"] == {"path": str(tmp_path / "a.txt"), "num_files": 1, "text_field": "text"}
    assert manifest["characters"] == 7
    assert (manifest["title"], manifest["license"]) == ("files of the trainer's own", None)


def test_what_was_read_and_what_was_skipped_is_said_and_stands_in_the_manifest(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "README.md", "b.doc"):
        (tmp_path / "in" / name).write_text("my text", encoding="utf-8")
    notes = []
    write_corpus(params("file", str(tmp_path / "in")), tmp_path / "corpus", notes.append)
    assert notes == [
        "file: reads 1 file(s): 1 .txt",
        "file: skips 2: README.md (about the data); b.doc (unknown suffix .doc)",
    ]
    skipped = json.loads((tmp_path / "corpus" / "manifest.json").read_text())["origin"]["skipped"]
    assert {group["reason"]: group["num"] for group in skipped} == {"about the data": 1, "unknown suffix .doc": 1}


def test_a_failure_leaves_the_last_corpus_and_nothing_half_written(written, tmp_path, monkeypatch):
    def failing(timeout_s):
        raise Unreachable("GitHub: no network")

    written("plays")
    monkeypatch.setattr(sources, "fetch_tiny_shakespeare", failing)
    with pytest.raises(UserError, match=r"no source gives \(GitHub: no network\); set data.source to plays"):
        written("tiny_shakespeare")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert (tmp_path / "corpus" / "text.txt").read_bytes() == b"nine plays"


def test_the_parameters_allow_the_sources_of_the_table_and_no_others():
    assert list(SOURCES) == list(REQUIRED_KEY)


@pytest.mark.parametrize("source", [name for name in SOURCES if name != "file"])
def test_the_summary_is_one_line_and_asks_no_server(source):
    assert "\n" not in source_summary(params(source, "a.txt"))


@pytest.mark.parametrize(("source", "key"), [(source, key) for source, key in REQUIRED_KEY.items() if key])
def test_a_source_without_the_key_that_it_needs_is_refused(source, key):
    with pytest.raises(ValueError, match=f"{key} is empty; source '{source}' needs it"):
        DataParams(**params(source, "a.txt").model_dump() | {key: None})


def test_the_summary_of_a_file_counts_it_or_says_that_it_is_missing(tmp_path):
    (tmp_path / "a.txt").write_text("my text", encoding="utf-8")
    assert source_summary(params("file", str(tmp_path))).startswith("1 file(s), 7 bytes")
    with pytest.raises(UserError, match="no such file"):
        source_summary(params("file", str(tmp_path / "b.txt")))

from dsv3.generation.sampling import Sample, markdown
from dsv3.tracking.events import Text
from dsv3.tracking.results import evaluate_events, sample_events, train_events

RECORD = {"name": "run", "experiment": "nano", "dvc": {}}


def test_the_texts_of_a_page_are_found_whatever_they_contain(tmp_path, params):
    fenced = "a\n```text\nb\n```\n\n## `no prompt`\n"
    samples = [Sample("To `be\n", (" or not",), 2), Sample("x", (fenced, "\n"), 9)]
    (tmp_path / "page.md").write_text(markdown(samples, params.sample, 1, RECORD))
    assert list(sample_events(tmp_path / "page.md", 7)) == [
        Text("sample", "To `be\n or not", 7, {"prompt": "To 'be"}),
        Text("sample", f"x{fenced}".rstrip("\n"), 7, {"prompt": "x", "number": 1}),
        Text("sample", "x", 7, {"prompt": "x", "number": 2}),
    ]


def test_stages_that_did_not_run_have_no_events(tmp_path):
    assert not [*train_events(tmp_path, 1), *evaluate_events(tmp_path, 1), *sample_events(tmp_path / "page.md", 1)]

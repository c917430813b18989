import pytest

from dsv3.artifacts import write_json
from dsv3.generation.sampling import Sample, markdown
from dsv3.generation.speculative import DraftCounts
from dsv3.tracking.events import Context, Distribution, Event, Result, Row, Text, path_name
from dsv3.tracking.results import evaluate_events, sample_events, train_events
from dsv3.tracking.stages import valid_events

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


def names_of_texts(tmp_path, params, prompts, continuations=("x",)) -> tuple[list[Context], list[str]]:
    """Return the contexts of a page's texts, and their names in trackers whose names are paths."""
    samples = [Sample(prompt, continuations, 1) for prompt in prompts]
    (tmp_path / "page.md").write_text(markdown(samples, params.sample, 1, RECORD))
    contexts = [event.context for event in sample_events(tmp_path / "page.md", 7) if isinstance(event, Text)]
    return contexts, [path_name("sample", context) for context in contexts]


@pytest.mark.parametrize("twins", [("a\n", "a"), ("To be", "To be"), ("a`b", "a'b"), ("b" * 40, f"{'b' * 40}c")])
@pytest.mark.parametrize("continuations", [("x",), ("x", "y")])
def test_every_prompts_text_has_a_name_of_its_own_in_every_tracker(tmp_path, params, twins, continuations):
    contexts, paths = names_of_texts(tmp_path, params, [twins[0], "other", twins[1]], continuations)
    number = len(continuations)
    assert len({tuple(context.items()) for context in contexts}) == len(set(paths)) == 3 * number
    assert [context.get("prompt_number") for context in contexts] == [1] * number + [None] * number + [3] * number


def test_a_text_whose_prompt_is_no_others_is_named_by_it_alone(tmp_path, params):
    assert names_of_texts(tmp_path, params, ["To be", "b" * 41]) == (
        [{"prompt": "To be"}, {"prompt": "b" * 41}],
        ["sample/To be", f"sample/{'b' * 40}"],
    )


def test_a_page_says_how_many_drafts_were_accepted_and_a_text_does_not(tmp_path, params):
    page, counts = tmp_path / "page.md", DraftCounts(drafted=1500, accepted=1000, tokens=40, passes=16)
    page.write_text(markdown([Sample("x", ("y",), 1, counts)], params.sample, 1, RECORD))
    assert next(sample_events(page, 7)) == Result(
        "sample", {"draft_acceptance": 1000 / 1500, "tokens_per_pass": 2.5}, 7
    )
    page.write_text(markdown([Sample("x", (f"\n| speculation | {counts} |\n",), 1)], params.sample, 1, RECORD))
    assert [type(event) for event in sample_events(page, 7)] == [Text]


def test_stages_that_did_not_run_have_no_events(tmp_path):
    assert not [
        *train_events(tmp_path / "run.json", 1),
        *evaluate_events(tmp_path / "metrics.json", 1),
        *sample_events(tmp_path / "page.md", 1),
    ]


def test_columns_of_older_results_are_shown_under_the_names_of_today(tmp_path):
    (tmp_path / "router.tsv").write_text("step\tlayer\tloads\n10\t1\t0.5 0.5\n")
    (tmp_path / "expert_load.tsv").write_text("layer\texpert\tload\n1\t0\t0.25\n1\t1\t0.75\n")
    assert list(train_events(tmp_path / "run.json", 10)) == [
        Row("router", {"step": 10, "layer": 1, "load_shares": "0.5 0.5"})
    ]
    (shown,) = evaluate_events(tmp_path / "metrics.json", 10)
    assert shown == Distribution("load_share", [0.25, 0.75], 10, {"subset": "heldout", "layer": 1})


def test_what_another_stage_left_counts_only_if_made_from_this_model_with_these_parameters(tmp_path):
    write_json(tmp_path / "metrics.json", {"heldout": {"nats_per_char": 1.5}})
    params = {"seed": 1, "evaluate": {"stride": 128}}
    evaluate = {
        "params": {"params.yaml": {"evaluate": {"stride": 128}}},
        "deps": [{"path": "code.py", "md5": "1"}, {"path": "model", "md5": "a"}],
        "outs": [{"path": str(tmp_path / "metrics.json")}, {"path": "table.tsv"}],
    }
    train = {"outs": [{"path": "model", "md5": "a"}, {"path": "history.tsv", "md5": "c"}]}
    lock = tmp_path / "dvc.lock"

    def results(**stages) -> list[Event]:
        write_json(lock, {"schema": "2.0", "stages": {"train": train, "evaluate": evaluate, **stages}})
        return list(valid_events(lock, params, 7))

    assert results() == [Result("evaluate", {"heldout": {"nats_per_char": 1.5}}, 7)]
    assert results(evaluate={**evaluate, "params": {"params.yaml": {"evaluate": {"stride": 64}}}}) == []
    assert results(train={"outs": [{"path": "model", "md5": "b"}]}) == []
    assert list(valid_events(tmp_path / "none", params, 7)) == []


@pytest.mark.parametrize(
    "text", ["", "[]", "schema: '2.0'", "stages: 3", "stages: {train: 1}", "<<<<<<< HEAD\nstages: {}\n=======\n", "\0"]
)
def test_a_dvc_lock_that_cannot_be_read_says_nothing(tmp_path, text):
    (tmp_path / "dvc.lock").write_text(text)
    assert list(valid_events(tmp_path / "dvc.lock", {}, 7)) == []

import json
import subprocess
from dataclasses import replace

import pytest

from benchmarks.studies.results import checked_with_dvc, read_results
from dsv3.errors import UserError
from dsv3.tracking.events import Result, Row
from dsv3.tracking.identity import RunIdentity
from dsv3.tracking.tracker import IsolatedTracker, OpenTrackers
from tests.benchmarks.studies_made_up import RESULT

NAMES = {"study-base-1": ("base", 1), "study-other-1": ("other", 1)}


def record(
    root,
    name: str,
    experiment: str = "study",
    score: float = 1.5,
    status: str = "finished",
    is_tied: bool = False,
    is_dense: bool = False,
) -> None:
    """Leave a run in Aim as train and evaluate do."""
    pytest.importorskip("aim", reason="Aim has no wheels for this Python")
    from dsv3.tracking.aim import AimTracker

    identity = RunIdentity(
        name=name,
        experiment=experiment,
        tags=(),
        params={},
        architecture={"vocab_size": 8, "hidden_size": 2, "tie_word_embeddings": is_tied},
        dvc={"exp_name": name, "git_sha": "abcdef0123", "data_source": "plays", "corpus_sha256": "0123456789"},
        env={"torch": "2"},
        size={"parameters_total": 9, "parameters_active": 5},
        key="f" * 64,
    )
    trackers = OpenTrackers([IsolatedTracker("aim", lambda: AimTracker(str(root)))], identity, None, "train")
    for step, loss in ((10, 5.0), (20, 4.5)):
        trackers.write(Row("history", {"step": step, "loss": loss}))
        trackers.write(Row("router", {"step": step, "layer": 1, "max_vio": 4.0 / step}))
        trackers.write(Row("router", {"step": step, "layer": 2, "max_vio": 6.0 / step}))
    trackers.write(Row("validation", {"step": 20, "loss": 4.25}))
    chosen = {"precision": "fp32", "experts": "cpu", "device": "cpu"}
    train = {"step": 20, "tokens_seen": 40, "epoch": 0.5, "tokens_per_s": 7.0, "validation": {"loss": 4.25}, **chosen}
    trackers.write(Result("train", train, 20))
    heldout = dict.fromkeys(("nats_per_token", "perplexity", "bits_per_byte"), 2.0) | {"nats_per_char": score}
    router = {} if is_dense else {"max_vio_global_max": 0.75, "dead_experts": 1}
    trackers.write(Result("evaluate", {"heldout": heldout, "router": router}, 20))
    trackers.close(status)


def test_the_finished_runs_of_the_study_are_read_and_the_latest_of_a_name_counts(tmp_path):
    record(tmp_path, "study-other-1", is_tied=True)
    record(tmp_path, "study-base-1", score=1.75)
    record(tmp_path, "study-base-1", score=1.25)
    record(tmp_path, "study-base-1", score=1.0, status="interrupted")
    record(tmp_path, "study-base-1", experiment="another", score=1.0)
    base, other = read_results(tmp_path, "study", NAMES)
    assert (base.name, base.nats_per_char, other.variant) == ("study-base-1", 1.25, "other")
    assert (base.max_vio, base.max_vio_batch, base.dead_experts) == (0.75, pytest.approx(0.3), 1)
    assert base.losses == {10: 5.0, 20: 4.5}
    assert base.validation_losses == {20: 4.25}
    assert (base.num_embedding, base.num_tokens, base.num_epochs) == (16, 40, 0.5)
    assert other.num_embedding == 0, "a tied embedding is the head, with which a token multiplies"
    assert base.conditions == "commit `abcdef0`, text `plays` (SHA-256 `01234567`), torch 2"


def test_a_model_without_a_router_is_one_line(tmp_path):
    record(tmp_path, "study-other-1", is_dense=True)
    with pytest.raises(UserError, match=r"^study-other-1: its model has no router, .*; leave other out of it$"):
        read_results(tmp_path, "study", NAMES)


def test_without_an_aim_repository_the_remedy_is_told(tmp_path):
    with pytest.raises(UserError, match="no Aim repository; run the study first"):
        read_results(tmp_path, "study", NAMES)


@pytest.fixture
def repository(tmp_path):
    """A repository with an experiment as DVC stores it: a commit under refs/exps."""

    def git(*arguments: str) -> str:
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "--quiet")
    metrics = tmp_path / "results" / "evaluate" / "headline.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps({"heldout": 1.5}))
    git("add", ".")
    git("commit", "--quiet", "--message", "two at a time")
    git("update-ref", "refs/exps/ab/cdef/study-base-1", "HEAD")
    return tmp_path


def test_results_that_dvc_confirms_come_back_with_how_they_were_made(repository):
    found = [replace(RESULT, name="study-base-1"), replace(RESULT, name="study-other-1")]
    assert checked_with_dvc(repository, found) == {"study-base-1": "two at a time"}


def test_an_experiment_of_older_code_is_one_line(repository):
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["rm", "--quiet", "-r", "results"], ["commit", "--quiet", "--allow-empty", "-m", "older"]):
        subprocess.run(["git", *author, *arguments], cwd=repository, check=True)
    subprocess.run(["git", "update-ref", "refs/exps/ab/cdef/study-base-1", "HEAD"], cwd=repository, check=True)
    with pytest.raises(UserError, match=r"^study-base-1: has no results/evaluate/headline\.json"):
        checked_with_dvc(repository, [replace(RESULT, name="study-base-1")])


def test_where_aim_and_dvc_disagree_dvc_is_the_truth(repository):
    with pytest.raises(UserError, match=r"^study-base-1: Aim holds 1.6 nats/char, DVC 1.5; DVC is the truth"):
        checked_with_dvc(repository, [replace(RESULT, name="study-base-1", nats_per_char=1.6)])

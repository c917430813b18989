import json
import subprocess
from dataclasses import replace
from hashlib import md5

import pytest
from dvc.repo import Repo

from dsv3.comparison import LEGEND, Run, comparison, difference, flat, grouped, read_runs, with_interval
from dsv3.errors import UserError
from dsv3.statistics import Sample

PARAMS = {"seed": 1, "train.use_fp8": False, "train.optim": "muon", "n_routed_experts": 8}
BASE = Run("main", PARAMS, {"heldout": 1.5, "val_loss": 3.5, "tokens_s": 3000, "dead_experts": 0, "parameters": 37216})
FP8 = Run("fp8", {**PARAMS, "train.use_fp8": True}, {**BASE.numbers, "heldout": 1.503, "tokens_s": 2400})


def seeded(run: Run, seed: int, heldout: float) -> Run:
    """The run with another seed and another score."""
    return Run(f"{run.name}-{seed}", {**run.params, "seed": seed}, {**run.numbers, "heldout": heldout})


def test_what_differs_stands_above_the_numbers_and_each_difference_below_its_number():
    assert comparison([BASE, FP8]).splitlines() == [
        "                                    main                fp8",
        "train.use_fp8                      False               True",
        "held-out nats/char                1.5000             1.5030",
        "                                          +0.0030 (+0.20 %)",
        "validation nats/token             3.5000             3.5000",
        "tokens/s                           3,000              2,400",
        "                                            -600 (-20.00 %)",
        "dead experts                           0                  0",
        "parameters                        37,216             37,216",
    ]


def test_as_markdown_it_is_one_table():
    lines = comparison([BASE, FP8], markdown=True).splitlines()
    assert lines[:4] == [
        "|  | main | fp8 |",
        "| --- | ---: | ---: |",
        "| train.use_fp8 | False | True |",
        "| held-out nats/char | 1.5000 | 1.5030<br>+0.0030 (+0.20 %) |",
    ]
    assert {line.count("|") for line in lines} == {4}


def test_runs_that_differ_in_their_seed_only_are_one_column_with_an_interval():
    runs = [BASE, FP8, seeded(BASE, 2, 1.6), seeded(FP8, 2, 1.605), seeded(FP8, 3, 1.7)]
    groups = grouped(runs)
    assert [group.name for group in groups] == ["main ×2", "fp8 ×3"]
    text = comparison(runs)
    assert "1.5500 ± 0.6353" in text  # 12.706 · 0.0707 / √2
    assert "+0.0040 ± 0.0127" in text  # of the two pairs: +0.003, +0.005
    assert "1, 2, 3" in text
    assert text.endswith(LEGEND)


def test_a_run_of_the_same_seed_and_parameters_is_a_column_of_its_own():
    runs = [BASE, replace(BASE, name="workspace")]
    assert len(grouped(runs)) == 2
    assert comparison(runs).endswith("\n\nNo parameter differs.")


@pytest.mark.parametrize(
    ("own", "first", "told"),
    [
        ({1: 2.0}, {1: 1.0}, "+1.00 (+100.00 %)"),
        ({2: 2.0}, {1: 1.0}, "+1.00 (+100.00 %)"),
        ({1: 2.0, 2: 4.0}, {1: 1.0}, "+1.00 (+100.00 %)"),  # of the seed that both have
        ({2: 2.0, 3: 4.0}, {1: 1.0}, "+2.00 (+200.00 %)"),  # of the means
        ({1: 2.0}, {1: 0.0}, "+2.00"),
        ({1: 2.0}, {1: 2.0}, ""),
    ],
)
def test_a_difference_is_that_of_runs_of_the_same_seed_or_else_of_the_means(own, first, told):
    assert difference(own, first, ".2f") == told


def test_an_interval_is_told_where_values_differ():
    assert with_interval(Sample((1000.0,)), ",.0f") == "1,000"
    assert with_interval(Sample((-1.0, -1.0)), "+.1f") == "-1.0"


def test_a_number_or_parameter_that_a_run_lacks_is_a_dash():
    other = Run("old", {**PARAMS, "z_loss_weight": 0.1}, {"heldout": 1.5})
    text = comparison([BASE, other])
    assert "z_loss_weight               –     0.1" in text
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("tokens/s")] == ["–"]


def test_many_runs_and_long_values_stay_within_the_terminal():
    prompts = str(["ROMEO:\n", "First Citizen:\n", "To be, or not to be"] * 3)
    others = [
        Run(f"experiment-{at}", {**PARAMS, "train.optim": f"optim-{at}", "sample.prompts": prompts}, BASE.numbers)
        for at in range(7)
    ]
    text = comparison([BASE, *others])
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("main") > 1  # again at the left of each part
    assert all(f"experiment-{at}" in text for at in range(7))
    for part in text.split("\n\n"):
        assert part.count("\ntrain.optim") == 1


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of DVC with one parameter and one headline number, which are not committed."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    Repo.init().close()
    stage = {"cmd": "true", "params": ["seed"], "metrics": [{"headline.json": {"cache": False}}]}
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"a": stage}}))
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    (tmp_path / "headline.json").write_text('{"heldout": 1.5}')
    return tmp_path


def test_a_run_is_what_dvc_reads_and_one_without_results_has_no_numbers(repository):
    assert read_runs(["workspace"]) == [Run("workspace", {"seed": 1}, {"heldout": 1.5})]
    (repository / "headline.json").unlink()
    assert read_runs(["workspace"]) == [Run("workspace", {"seed": 1}, {})]


def locked(folder, stage="a", deps=(), **sections):
    """Write the dvc.lock of a stage that was run with these dependencies and sections of params.yaml."""
    entry = {"cmd": "true", "deps": list(deps), "params": {"params.yaml": sections}}
    (folder / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": {stage: entry}}))


def commit(message):
    author = ["-c", "user.name=n", "-c", "user.email=e@x"]
    for arguments in (["add", "."], [*author, "commit", "-q", "-m", message]):
        subprocess.run(["git", *arguments], check=True)


def test_parameters_that_the_numbers_were_not_made_with_are_told_in_the_workspace_and_in_commits(repository):
    (repository / "params.yaml").write_text(
        "seed: 1\ntrain: {learning_rate: 8.0e-3, steps: 1}\nruntime: {device: cpu}\n"
    )
    locked(repository, seed=1, train={"learning_rate": 0.008, "steps": 1})
    commit("as it was run")
    (repository / "params.yaml").write_text(
        "seed: 2\ntrain: {learning_rate: 1.0e-1, steps: 1}\nruntime: {device: cuda}\n"
    )
    runs = read_runs(["HEAD", "workspace"])
    assert [run.stale for run in runs] == [{}, {"a": ["seed", "train.learning_rate"]}]
    note = "workspace: shows other values than a ran with (dvc.lock): seed, train.learning_rate; dvc repro"
    for markdown in (False, True):
        assert comparison(runs, markdown).endswith(f"\n\n{note}")
    commit("not run")
    assert [run.stale for run in read_runs(["HEAD", "HEAD~1"])] == [runs[1].stale, {}]


def test_a_parameter_that_came_or_went_since_the_run_is_told(repository):
    (repository / "params.yaml").write_text("seed: 1\ntrain: {new: 1}\n")
    locked(repository, seed=1, train={"old": 1}, gone={"key": 1})
    assert read_runs(["workspace"])[0].stale == {"a": ["train.old", "gone.key", "train.new"]}


def test_an_architecture_that_was_edited_and_not_run_is_told_in_the_workspace_and_in_commits(repository):
    (repository / "nano.json").write_text('{"hidden_size": 64}')
    (repository / "params.yaml").write_text("seed: 1\nmodel: {config: nano.json}\n")
    digest = md5((repository / "nano.json").read_bytes(), usedforsecurity=False).hexdigest()
    locked(repository, deps=[{"path": "nano.json", "hash": "md5", "md5": digest}], model={"config": "nano.json"})
    commit("as it was run")
    (repository / "nano.json").write_text('{"hidden_size": 128}')
    runs = read_runs(["HEAD", "workspace"])
    assert [run.stale for run in runs] == [{}, {"a": ["nano.json"]}]
    assert "workspace: shows other values than a ran with (dvc.lock): nano.json; dvc repro" in comparison(runs)
    commit("not run")
    assert [run.stale for run in read_runs(["HEAD", "HEAD~1"])] == [runs[1].stale, {}]
    (repository / "nano.json").unlink()
    assert read_runs(["workspace"])[0].stale == {}, "DVC tells of a file that is not there"


@pytest.mark.parametrize(("changed", "columns"), [(None, 1), ("code.py", 2), ("data/corpus", 2)])
def test_runs_of_other_code_or_data_are_columns_of_their_own(repository, changed, columns):
    deps = [{"path": path, "hash": "md5", "md5": "a" * 32} for path in ("code.py", "data/corpus")]
    for seed in (1, 2):
        (repository / "params.yaml").write_text(f"seed: {seed}\n")
        of_this = [dep | {"md5": f"{seed}" * 32} if dep["path"] == changed else dep for dep in deps]
        locked(repository, "train", of_this, seed=seed)
        commit(f"seed {seed}")
    runs = read_runs(["HEAD~1", "HEAD"])
    assert len(grouped(runs)) == columns
    note = f"HEAD: trained from other code or data than HEAD~1: {changed}"
    assert (note in comparison(runs)) is (columns == 2)


def test_of_many_files_that_differ_the_first_few_are_told():
    first, second = ({f"{at}.py": digest for at in range(9)} for digest in "ab")
    text = comparison([replace(BASE, origin=first), replace(BASE, name="new", origin=second)])
    assert text.endswith("new: trained from other code or data than main: 0.py, 1.py, 2.py, …")


def test_a_seed_that_was_edited_and_not_run_makes_no_interval():
    edited = replace(seeded(BASE, 2, 1.5), stale={"train": ["seed"]})
    for runs in ([BASE, edited], [edited, BASE]):
        assert len(grouped(runs)) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "headline.json",
            '{"heldout": "x"}',
            "^workspace: headline.json: heldout is 'x'; must be a number; dvc checkout",
        ),
        ("headline.json", '{"heldout": true}', "^workspace: headline.json: heldout is True; must be a number"),
        ("headline.json", '{"heldout": {"a": 1}}', "^workspace: headline.json: heldout is .*; must be a number"),
        ("headline.json", "{", "^workspace: headline.json: .*; git checkout brings a file back$"),
        ("params.yaml", "{", "^workspace: unable to read: .*params.yaml.*; git checkout brings a file back$"),
        ("dvc.yaml", "{", "^workspace: .*dvc.yaml.*; git checkout brings a file back$"),
        ("dvc.lock", "<<<<<<< HEAD", "^workspace: .*dvc.lock.*; git checkout brings a file back$"),
    ],
)
def test_what_dvc_cannot_read_is_one_line_instead_of_a_dash(repository, name, content, message):
    (repository / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_runs(["workspace"])


def test_runs_without_results_are_a_users_mistake():
    with pytest.raises(UserError, match=r"^main, fp8: no headline numbers; run dvc repro"):
        comparison([replace(BASE, numbers={}), replace(FP8, numbers={})])


def test_parameters_are_named_by_section_and_key():
    assert flat({"seed": 1, "train": {"optim": "muon"}, "rope": {}}) == {"seed": 1, "train.optim": "muon", "rope": {}}

"""Each benchmark runs, on inputs of a laboratory; nothing is asked about time."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import generate, growth, quality, startup, time_to_loss, tokenize
from benchmarks.nano_gpt import GPT, Recipe, batches, character_ids, nats_per_char
from benchmarks.page import FOLDER, PAGE, SECTIONS, page, results, step_tables
from benchmarks.results import Result, Table, markdown
from benchmarks.timing import median_ratio, paired_s, process_cost
from dsv3.data.meta import open_stream, read_meta
from dsv3.evaluation.sliding_window import SPLITS, evaluate
from dsv3.export.loading import load_model
from dsv3.params.read import read_params
from tests.exported_model import write_exported
from tests.training_inputs import ROOT, write_inputs

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n\n" * 30


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    write_exported(folder)
    (folder / "corpus" / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def found(main: Callable[..., None], folder: Path, **options: Any) -> list[dict[str, Any]]:
    """The tables of a benchmark, each row by its first cell."""
    path = folder / f"{main.__module__.split('.')[-1]}.json"
    main(**options, json_path=path)
    values = json.loads(path.read_text(encoding="utf-8"))
    assert {"device", "threads", "commit"} <= set(values["conditions"])
    assert markdown(values).count("\n| --- |") == len(values["tables"])
    return [
        {row[0]: dict(zip(table["columns"][1:], row[1:], strict=True)) for row in table["rows"]}
        for table in values["tables"]
    ]


def test_quality_scores_both_halves_in_three_ways_and_stock_agrees(lab, tmp_path):
    places = {"model": lab / "final_model", "tokens": lab / "tokens", "params": lab / "params.yaml"}
    (table,) = found(quality.main, tmp_path, **places, device="cpu")
    sliding, apart, stock = table.values()
    assert apart == pytest.approx(stock, abs=2e-4)
    assert sliding != apart
    halves = sliding["validation half"], sliding["test half"]
    assert min(halves) <= sliding["held-out, nats/char"] <= max(halves)


def test_documents_that_do_not_see_each_other_are_scored_as_evaluate_scores_them(lab, monkeypatch):
    params = read_params(lab / "params.yaml").evaluate.model_copy(update={"cross_document_attention": False})
    model = load_model(lab / "final_model", torch.device("cpu"))
    frequent = int(np.bincount(open_stream(lab / "tokens", read_meta(lab / "tokens"), "test")[:]).argmax())
    meta = read_meta(lab / "tokens").model_copy(update={"bos_token_id": frequent})
    monkeypatch.setattr(quality, "read_meta", lambda tokens: meta)
    streams = {split: open_stream(lab / "tokens", meta, split) for split in SPLITS}
    expected = evaluate(model, streams, meta.model_dump(), params).scores
    assert quality.scores(model, lab / "tokens", params) == expected
    together = params.model_copy(update={"cross_document_attention": True})
    assert quality.scores(model, lab / "tokens", together) != expected


def test_generate_compares_the_tokens_of_all_contestants(lab, tmp_path):
    (table,) = found(
        generate.main, tmp_path, model=lab / "final_model", prompt="the", new_tokens=6, rounds=1, threads=1,
        params=lab / "params.yaml", device="cpu",
    )  # fmt: skip
    assert list(table) == [generate.STOCK, generate.OURS, generate.DRAFTED]
    assert all(row["stock's tokens"] for row in table.values())
    assert "reproducible by its seed: yes" in (tmp_path / "generate.json").read_text(encoding="utf-8")


def test_startup_times_whole_processes_beside_a_bare_python(tmp_path):
    (table,) = found(startup.main, tmp_path, rounds=1, only="download --help")
    assert list(table) == ["python", "download --help"]
    assert table["python"]["wall, of bare Python's"] == 1
    assert all(row["peak MiB"] > 1 for row in table.values())


def test_tokenize_measures_the_stage_and_the_library(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text(TEXT, encoding="utf-8")
    costs = list(tokenize.measured(text.read_bytes(), [1], 300))
    assert [name for name, *_ in costs] == [tokenize.OURS, tokenize.PEER]
    assert all(abs(size - 1e6) < len(TEXT) for _, size, _ in costs)
    assert tokenize.rows(costs)[0][4] is None  # of the smallest size there is no speed
    table = [[name, 2.0, 0.0, 0.0, speed] for name, speed in ((tokenize.OURS, 3.0), (tokenize.PEER, 1.5))]
    assert tokenize.ratio_table(table).rows == [["2.0 MB", 2.0]]


def test_growth_trains_each_point_in_a_process_of_its_own(lab, tmp_path):
    points, lines = found(
        growth.main, tmp_path, config=lab / "config.json", batches="1", blocks="", layers="", experts="8",
        optim="adamw", steps=1, threads=1, params=lab / "params.yaml", point=None,
    )  # fmt: skip
    assert list(points) == ["batch 1", "experts 8"]
    assert all(row["s per step"] > 0 and row["predicted MiB"] > 0 for row in points.values())
    assert lines == {}
    assert growth.r_squared([1, 2, 3], [2.0, 4.0, 6.0]) == pytest.approx(1)


def test_growth_predicts_the_memory_of_the_training_that_it_measures(lab, tmp_path):
    unlike = {"use_fp8": True, "gradient_checkpointing": True, "ema_decay": 0.9, "hidden_dropout": 0.1}
    write_inputs(tmp_path, train=unlike)  # another training, which is not the one that is measured
    points = [
        growth.Point(str(lab / "config.json"), 1, 32, 2, 4, "adamw", steps=1, params=str(folder / "params.yaml"))
        for folder in (lab, tmp_path)
    ]
    assert points[0].predicted_bytes() == points[1].predicted_bytes()


def test_time_to_loss_scores_the_average_where_one_is_exported(lab):
    params = time_to_loss.shortened(read_params(lab / "params.yaml"), steps=4, seed=1)
    averaged = params.model_copy(update={"train": params.train.model_copy(update={"ema_decay": 0.9})})
    (_, last), (_, average) = (time_to_loss.our_result(each, lab / "tokens") for each in (params, averaged))
    assert last != average  # the average takes no part in the training


def test_time_to_loss_trains_by_both_recipes_on_one_text(lab, tmp_path):
    (table,) = found(
        time_to_loss.main, tmp_path, steps=2, seeds=1, peer_steps=3, corpus=lab / "corpus", tokens=lab / "tokens",
        params=lab / "params.yaml", threads=1,
    )  # fmt: skip
    ours, peer = table[time_to_loss.OURS], table[time_to_loss.PEER]
    assert peer["times as fast"] == 1
    assert ours["s of training"] > 0
    assert 0 < ours["mean nats/char"] < math.log(272) + 1


def test_the_peers_model_has_the_published_size_and_begins_at_uniform_guesses():
    model = GPT(Recipe(), 65)
    assert sum(p.numel() for p in model.parameters()) - model.positions.weight.numel() == 795_904  # "0.80M"
    ids, vocab_size = character_ids(TEXT)
    model = GPT(Recipe(), vocab_size).eval()
    assert nats_per_char(model, ids, 64) == pytest.approx(math.log(vocab_size), abs=0.1)
    changed = ids[:65].clone()
    changed[40] = (changed[40] + 1) % vocab_size
    before, after = (model(x[None, :64]) for x in (ids[:65], changed))
    assert torch.equal(before[0, :40], after[0, :40])  # it is causal
    assert next(batches(ids, Recipe(), torch.Generator())).shape == (12, 65)


def test_the_peers_rate_rises_falls_and_ends_at_its_minimum():
    recipe = Recipe()
    assert recipe.rate(0) == pytest.approx(1e-3 / 101)
    assert recipe.rate(100) == pytest.approx(1e-3)
    assert recipe.rate(2000) == pytest.approx(1e-4)


def test_ratios_are_of_the_same_round():
    assert median_ratio([1, 20, 3], [2, 40, 6]) == 0.5
    calls: list[str] = []
    times = paired_s({name: lambda name=name: calls.append(name) for name in "ab"}, 3, torch.device("cpu"))
    assert list(map(len, times.values())) == [3, 3]
    assert calls == list("aabb" + "bbaa" + "aabb")  # each is called once more, untimed; the order rotates


def test_a_process_is_charged_with_its_own_memory_not_its_starters():
    held = torch.zeros(1 << 26)  # 256 MiB
    cost = process_cost([sys.executable, "-c", "x = sum(range(10**6))"])
    assert cost.peak_bytes < 100 << 20 < held.nbytes
    assert 0 < cost.cpu_s < 60
    with pytest.raises(RuntimeError, match="status 3"):
        process_cost([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_page_is_what_the_files_say():
    assert PAGE.read_text(encoding="utf-8") == page(results(FOLDER)), "python -m benchmarks.page"
    assert set(results(FOLDER)) <= set(SECTIONS)


def test_every_section_is_a_benchmark_that_make_bench_runs():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"BENCHMARKS := {' '.join(SECTIONS)}\n" in makefile
    assert all((ROOT / f"benchmarks/{name}.py").is_file() for name in SECTIONS)


def test_a_result_is_a_page_without_a_typed_number():
    table = Table("T", ["", "x"], [["a", 0.123456], ["b|", 12345], ["c", None], ["d", True]], ["All is well."])
    text = markdown(json.loads(json.dumps(vars(Result("Q?", {"threads": 2}, {}, [vars(table)])))), "name")
    assert "| a | 0.1235 |" in text
    assert "| b\\| | 12,345 |" in text
    assert "| c |  |" in text
    assert "| d | yes |" in text
    steps = {"steps": {"ours": {"milliseconds": 2.0}}, "conditions": {}, "setting": {"config": "/where/nano.json"}}
    assert step_tables(steps)["tables"][0]["rows"] == [["ours", 2.0]]
    assert step_tables(steps)["setting"] == {"config": "nano.json"}

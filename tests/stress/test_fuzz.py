"""A few cases of each kind of damaged input; `python -m tests.stress.fuzz` and `tests.stress.damaged` try thousands."""

import pytest

from tests.stress import damaged, fuzz

FEW = {
    "params.yaml": (fuzz.fuzz_params, 60),
    "architectures": (fuzz.fuzz_architectures, 60),
    "data": (fuzz.fuzz_data, 40),
}


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("fuzz")
        patch.setenv("DVC_ROOT", str(folder))
        yield fuzz.Laboratory(folder)


@pytest.mark.parametrize("kind", FEW)
def test_a_damaged_input_is_refused_in_one_line_or_accepted_by_every_rule(laboratory, kind):
    tried, number = FEW[kind]
    report = tried(laboratory, number, seed=1)
    assert report.faults == []
    assert min(report.endings["accepted"], report.endings["refused"]) > 3  # the cases are of both kinds


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("damaged")
        patch.setenv("DVC_ROOT", str(folder))
        yield damaged.Bench(folder)


@pytest.mark.parametrize(("kind", "number"), [("tokens", 14), ("corpus", 10), ("model", 12)])
def test_a_damaged_file_is_refused_in_one_line_or_changes_no_result(bench, kind, number):
    report = damaged.damage(kind, number, 1, bench)
    assert report.faults == []
    assert report.endings["refused"] > number / 2

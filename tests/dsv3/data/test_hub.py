import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.data import hub
from dsv3.data.hub import fetch_commit, write_hub
from dsv3.errors import UserError
from dsv3.params.data import DataParams


def params(hub_id, **changes):
    defaults = {
        "source": "hub",
        "path": None,
        "text_field": "text",
        "hub_id": str(hub_id),
        "hub_config_name": None,
        "hub_revision": None,
        "hub_split": "train",
        "timeout_s": 2.0,
    }
    return DataParams(**defaults | changes)


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """A data set in a folder, which `datasets` reads like one of the Hub's; its commit is stated."""
    folder = tmp_path / "stories"
    folder.mkdir()
    rows = [json.dumps({"text": text, "n": 1}) for text in ("once", "upon", "a time")]
    (folder / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for name, value in (("USE_TORCH", "NO"), ("HF_HUB_DOWNLOAD_TIMEOUT", "2"), ("HF_HUB_ETAG_TIMEOUT", "2")):
        monkeypatch.setenv(name, value)  # write_hub sets what is not set; the tests that follow must not see it
    monkeypatch.setattr(hub, "fetch_commit", lambda hub_id, revision, timeout_s: "c0ffee")
    return folder


def test_the_rows_become_documents_and_the_commit_is_recorded(data_set, tmp_path):
    (tmp_path / "corpus").mkdir()
    measure, origin = write_hub(params(data_set), tmp_path / "corpus")
    assert (measure.num_documents, measure.characters) == (3, 14)
    assert origin.source == "hub"
    assert origin.origin == {"hub_id": str(data_set), "revision": "c0ffee", "config": None, "split": "train"}
    assert origin.title == str(data_set)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_field": "story"}, r"row 0: has no column story; set data.text_field to one of text, n"),
        ({"hub_split": "nonsense"}, r"reading it failed \(Bad split: nonsense"),
        ({"hub_config_name": "nonsense"}, r"reading it failed \(BuilderConfig 'nonsense' not found"),
    ],
)
def test_a_wrong_column_split_or_configuration_is_told_in_one_line(data_set, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        write_hub(params(data_set, **changes), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("hub_id", ["nobody/nothing", "no id at all"])
def test_a_data_set_that_cant_be_reached_is_told_in_one_line(hub_id):
    with pytest.raises(UserError, match=f"data.hub_id is {hub_id} at revision main; it can't be read") as error:
        fetch_commit(hub_id, "main", timeout_s=2)
    assert "\n" not in str(error.value)


def _without_library_settings():
    return {name: value for name, value in os.environ.items() if name != "USE_TORCH"}


def test_reading_a_data_set_needs_no_torch(data_set, tmp_path):
    code = (
        "import sys; from pathlib import Path; from dsv3.data import hub; from dsv3.params.data import DataParams\n"
        "hub.fetch_commit = lambda *arguments: 'c0ffee'\n"
        "hub.write_hub(DataParams.model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
        "assert 'datasets' in sys.modules and 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, params(data_set).model_dump_json(), str(tmp_path)]
    subprocess.run(
        command, check=True, env=_without_library_settings() | {"PYTHONPATH": str(Path(__file__).parents[3])}
    )

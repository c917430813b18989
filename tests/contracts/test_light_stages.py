"""The stages that prepare the ground really run without torch: minutes of import would be paid for nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.committed import PROJECT
from tests.contracts.import_closure import ROOT

RUN = """
import runpy, sys
name, *arguments = sys.argv[1:]
sys.argv = [name, *arguments]
try:
    runpy.run_module(name, run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
print("imported:", *sorted({"torch", "transformers", "accelerate", "aim"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text of its own and the parameters that name it; the stages run in the order of the tests."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "text.txt").write_text("To be, or not to be: that is the question.\n" * 400)
    yaml = YAML()
    params = yaml.load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    params["data"].update(source="file", path=str(folder / "text.txt"))
    params["tokenize"]["vocab_size"] = 300
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        "stages.download --output {0}/corpus",
        "stages.tokenize --corpus {0}/corpus --output {0}/tokens --metrics {0}/tokenize.json",
        "stages.estimate_size --output {0}/sizes",
    ],
    ids=lambda arguments: arguments.split()[0],
)
def test_a_light_stage_runs_without_torch(workspace: Path, arguments: str):
    command = [*arguments.format(workspace).split(), "--params", str(workspace / "params.yaml")]
    result = subprocess.run(
        [sys.executable, "-c", RUN, *command],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "imported:"

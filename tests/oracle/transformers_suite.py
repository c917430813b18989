"""Transformers' common tests of a model, over our classes and over its own DeepSeek-V3 (stock).

`python -m tests.oracle.transformers_suite FOLDER`: FOLDER is transformers' source distribution, unpacked, of the
version that is installed:

    pip download --no-deps --no-binary :all: transformers==5.23.0
    tar xzf transformers-5.23.0.tar.gz
    pip install parameterized

The distribution has the common tests, and lacks what some of them import: the tests of generation and of exporters,
which are left out with it, and two helpers, which stand below. At the end stands a table, and the names of tests that
stock passes and ours does not; the exit status is pytest's.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.training_inputs import ROOT

MISSING = {
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'output_hidden_states': True, 'dtype': 'float16'}\n",
    "distributed_testing_utils.py": "run_distributed = None\n",
}
"""Modules of transformers' tests that the distribution lacks, each with the least that its importers need."""

OUTCOME = re.compile(r"::(Ours|Stock)Test::(\S+) (PASSED|FAILED|SKIPPED|ERROR)")


def write_tests(source: Path, folder: Path) -> None:
    """Copy the distribution's tests into `folder`, with what they lack and the cases of this project."""
    tests = Path(shutil.copytree(source / "tests", folder / "tests"))
    for name, text in MISSING.items():
        path = tests / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for package in {tests, *(path.parent for path in tests.rglob("*.py"))}:
        (package / "__init__.py").touch()
    shutil.copy(ROOT / "tests/oracle/transformers_cases.py", tests / "test_deepseek_v3.py")
    shutil.copytree(ROOT / "mini_model", folder / "mini_model")


def main(source: Path) -> int:
    """Run the tests; print a line for each failure, and the table; return pytest's exit status."""
    with tempfile.TemporaryDirectory(prefix="dsv3-suite-") as name:
        write_tests(source, Path(name))
        command = ["pytest", "-v", "-W", "ignore", "-p", "no:cacheprovider", "-n", "0", "tests/test_deepseek_v3.py"]
        result = subprocess.run(
            [sys.executable, "-m", *command], cwd=name, stdout=subprocess.PIPE, text=True, check=False
        )
    print("\n".join(line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))))
    outcomes = {(kind, test): outcome for kind, test, outcome in OUTCOME.findall(result.stdout)}
    print("| class | passed | skipped | failed |\n| --- | ---: | ---: | ---: |")
    for kind in ("Ours", "Stock"):
        counts = Counter(outcome for (whose, _), outcome in outcomes.items() if whose == kind)
        print(f"| {kind} | {counts['PASSED']} | {counts['SKIPPED']} | {counts['FAILED'] + counts['ERROR']} |")
    for (kind, test), outcome in outcomes.items():
        if kind == "Stock" and outcome == "PASSED" and outcomes.get(("Ours", test)) != "PASSED":
            print(f"stock passes, ours: {outcomes.get(('Ours', test))}: {test}")
    return result.returncode


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.oracle.transformers_suite FOLDER (transformers' sources, unpacked)")
    raise SystemExit(main(Path(sys.argv[1]).resolve()))

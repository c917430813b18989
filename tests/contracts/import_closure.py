"""Run `python -m tests.contracts.import_closure` to bring every stage's code dependencies in dvc.yaml up to date.

Which files they are says `dsv3.dependencies`.
"""

import re

from dsv3.dependencies import ROOT, dependencies


def refreshed(pipeline: str) -> str:
    """Return the text of dvc.yaml with each stage's Python dependencies as they are now."""

    def refresh(match: re.Match[str]) -> str:
        others = [line for line in match["deps"].splitlines(keepends=True) if not line.endswith(".py\n")]
        code = [f"      - {name}\n" for name in dependencies(match["stage"])]
        return "".join([match["head"], "\n", *code, *others])

    stage = r"(?P<head>^  (?P<stage>\w+):\n(?:    .*\n)*?    deps:)(?: \[\])?\n(?P<deps>(?:      - .*\n)*)"
    return re.sub(stage, refresh, pipeline, flags=re.MULTILINE)


if __name__ == "__main__":
    file = ROOT / "dvc.yaml"
    file.write_text(refreshed(file.read_text(encoding="utf-8")), encoding="utf-8")

"""A copy of the repository in a folder of its own, small enough to run the whole pipeline in seconds."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.committed import MODELS, PROJECT, git, is_written
from tests.training_inputs import MICRO, ROOT

SPEAKERS = ["ROMEO", "JULIET", "Nurse", "First Citizen", "KING RICHARD"]
NOUNS = ["night", "crown", "sword", "love", "grave", "morning", "brother", "tongue"]
VERBS = ["breaks", "speaks", "trembles", "burns", "sleeps", "calls", "weeps"]
SIZES = {
    "model": {"config": "mini_model/config_nano.json"},
    "data": {"source": "file", "path": "verses.txt"},
    "tokenize": {"vocab_size": 272},
    "train": {
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": 16,
        "block_size": 48,
        "eval_steps": 10,
        "learning_rate": 0.01,
        "precision": "fp32",
    },
    "evaluate": {"per_device_eval_batch_size": 16, "block_size": 48, "stride": 24},
    "sample": {"prompts": ["ROMEO:\n"], "max_new_tokens": 12},
    "runtime": {"logging_steps": 2, "save_steps": 5, "device": "cpu"},
}


def verses(num_lines: int) -> str:
    """A text with some structure, the same every time."""
    generator = random.Random(7)
    lines = []
    for number in range(num_lines):
        if number % 4 == 0:
            lines += ["", f"{generator.choice(SPEAKERS)}:"]
        lines.append(f"The {generator.choice(NOUNS)} that {generator.choice(VERBS)} is my {generator.choice(NOUNS)},")
    return "\n".join(lines[1:]) + "\n"


@dataclass(frozen=True)
class Laboratory:
    """A Git repository with the pipeline in it."""

    root: Path
    programs: Path | None = None
    """A warm Python's, which `run` finds first."""

    @classmethod
    def at(cls, root: Path) -> "Laboratory":
        """Copy the working tree's code to `root`, with a micro model under nano's name and a made-up text."""
        new_code = git("ls-files", "--others", "--exclude-standard", "dsv3", "stages", "mini_model").splitlines()
        for name in [*git("ls-files").splitlines(), *new_code]:
            if (ROOT / name).is_file() and not is_written(name):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        for name in ("params.yaml", *MODELS):
            shutil.copy2(PROJECT / name, root / name)
        lab = cls(root)
        (root / "verses.txt").write_text(verses(1500))
        nano = {**MICRO, "num_nextn_predict_layers": 0}
        (root / "mini_model/config_nano.json").write_text(json.dumps(nano, indent=2))
        lab.set_params(SIZES)
        lab.run("git", "init", "--quiet", "--initial-branch", "main")
        lab.commit("A small laboratory")
        return lab

    def set_params(self, sections: dict[str, dict[str, Any]]) -> None:
        """Change values of params.yaml in place."""
        yaml, path = YAML(), self.root / "params.yaml"
        params = yaml.load(path.read_text())
        for section, values in sections.items():
            params[section].update(values)
        with path.open("w") as file:
            yaml.dump(params, file)

    def commit(self, message: str) -> None:
        """Commit everything."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)

    def environment(self) -> dict[str, str]:
        """The environment of an activated virtual environment, and an author for Git."""
        author = {
            f"GIT_{who}_{what}": "lab@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        first = [str(self.programs)] if self.programs else []
        path = os.pathsep.join([*first, str(Path(sys.executable).parent), os.environ["PATH"]])
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
        return {**inherited, **author, "PATH": path, "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"}

    def run(self, *command: str, status: int = 0, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command at the root; its exit status must be `status`."""
        result = subprocess.run(
            command, cwd=self.root, env=self.environment(), capture_output=True, text=True, timeout=timeout, check=False
        )
        assert result.returncode == status, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
        return result

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in a process group of its own, as a terminal does; nothing of it is warm."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=Laboratory(self.root).environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace a text that stands in a file."""
        path = self.root / name
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{name} has no {old!r}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    def restore(self) -> None:
        """Go back to the last commit, and to the outputs that it names."""
        self.run("git", "checkout", "--quiet", "--force", "HEAD")
        self.run("dvc", "checkout", "--force")

    def json(self, name: str) -> Any:
        """The content of a JSON file."""
        return json.loads((self.root / name).read_text())

    def rows(self, name: str) -> list[list[str]]:
        """The cells of a table, its header first."""
        return [line.split("\t") for line in (self.root / name).read_text().splitlines()]

    def aim_runs(self, scratch: Path) -> dict[str, Any]:
        """Its Aim runs by experiment, else by name, read from a copy without the index, which only `aim up` fills."""
        Repo = pytest.importorskip("aim", reason="Aim has no wheels for this Python").Repo
        copy = scratch / "aim_copy"
        shutil.copytree(self.root / ".aim", copy / ".aim", ignore=shutil.ignore_patterns("index", "LOCK"))
        return {run["dvc"].get("exp_name") or run.name: run for run in Repo.from_path(str(copy)).iter_runs()}

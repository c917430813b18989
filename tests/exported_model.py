"""A small exported model with random weights and all that `evaluate` and `sample` read, made in a second."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3.artifacts import read_json, write_json
from dsv3.export.huggingface import export_huggingface
from dsv3.params.read import Params
from dsv3.tracking.identity import run_identity
from dsv3.tracking.recorder import record_of
from dsv3.training.model import build_model
from tests.training_inputs import ROOT, write_inputs


def write_exported(folder: Path, **sections: dict) -> Path:
    """Write tokens, an exported model and run.json into `folder`; return its params.yaml, overlaid with `sections`."""
    params = write_inputs(folder, **{"sample": {"max_new_tokens": 8, "prompts": ["To be", "the king\n"]}, **sections})
    model = build_model(folder / "config.json", seed=0)
    export_huggingface(model, model.state_dict(), folder / "tokens", folder / "final_model", "A card\n")
    values = Params.model_validate(YAML(typ="safe").load(params.read_text()))
    architecture, meta = read_json(folder / "config.json"), read_json(folder / "tokens" / "meta.json")
    identity = run_identity(values, "f" * 64, architecture, meta, {}, {"device": "cpu"})
    write_json(folder / "run.json", record_of(identity, None, ".aim", step=12))
    return params


def run_without_home(stage: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a stage in `folder` as a user whose home can't be written, not even by root: a file stands there."""
    home = folder / "home"
    home.touch()
    inherited = {name: value for name, value in os.environ.items() if name not in {"HF_HOME", "MPLCONFIGDIR"}}
    return subprocess.run(
        [sys.executable, "-m", f"stages.{stage}", *options],
        cwd=folder,
        env={**inherited, "HOME": str(home), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def set_params(folder: Path, **sections: dict) -> None:
    """Overlay the params.yaml in `folder`."""
    yaml = YAML()
    params = yaml.load((folder / "params.yaml").read_text())
    for section, values in sections.items():
        params[section].update(values)
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(params, file)


def edit_json(path: Path, **changes: object) -> None:
    """Overlay a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


Tensors = dict[str, Tensor]


def broken(folder: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Copy an exported folder to `target` with other tensors; return `target`."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("SHA256SUMS"))
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors")
    return target


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


def without(tensors: Tensors, part: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if part not in key}


def transposed(tensors: Tensors, part: str) -> Tensors:
    return {key: tensor.T.contiguous() if part in key else tensor for key, tensor in tensors.items()}

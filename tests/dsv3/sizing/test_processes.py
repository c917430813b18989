"""The most that one of several processes holds in two steps, over gloo, against the sizing stage's estimate.

As a module, this file is the program that trains.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.committed import PROJECT
from tests.dsv3.sizing.memory_probe import HeldBytes
from tests.dsv3.training import test_sharding as sharded
from tests.training_inputs import MICRO, run_python, started_run

NANO = json.loads((PROJECT / "mini_model" / "config_nano.json").read_text(encoding="utf-8"))
SIZES = {name: value for name, value in NANO.items() if name in MICRO} | sharded.EXPERTS | {"vocab_size": 512}
"""Weights of nano's widths, few tokens: what is gathered outweighs activations, as on machines with many GPUs."""


def case(num_processes: int, architecture: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    settings = {"max_steps": 2, "block_size": 64, "gradient_accumulation_steps": 2 * num_processes, **settings}
    return sharded.case(num_processes, SIZES | (architecture or {}), **settings)


CASES = {
    "muon": case(2),
    "bf16 moments": case(4, optim="adamw", adam_moments_dtype="bf16"),
    "without accumulation": case(2, optim="adamw", gradient_accumulation_steps=2),
    "MTP": case(2, {"num_nextn_predict_layers": 1}),
    "tied": case(2, {"tie_word_embeddings": True, "vocab_size": 4096}),
    "three": case(3),
    "hybrid": case(4, sharding="hybrid"),
    "kept after the forward pass": case(2, reshard_after_forward=False),
    "long, recomputed": case(2, per_device_train_batch_size=16, gradient_checkpointing=True),
    "bf16, recomputed": case(2, precision="bf16", experts="grouped_mm", gradient_checkpointing=True, optim="adamw"),
    "FP8": case(2, use_fp8=True),
    "experts over two of four": case(4, expert_parallel=2),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("processes")
    done = run_python(folder, "-m", "tests.dsv3.sizing.test_processes", str(folder), timeout_s=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_a_process_is_the_estimate_to_a_twentieth(measured, name):
    """Left out are temporary tensors within an operation; a layer's weights too many or too few would be 8 to 14 %."""
    assert measured[name]["estimated"] == pytest.approx(measured[name]["peak"], rel=0.05)


def train_case(folder: Path, name: str) -> None:
    """Train as one of several processes; the main one writes the most that any has held."""
    from dsv3.sizing.sharded import StateSharing, process_memory
    from dsv3.training.loop import train

    given, rank = CASES[name], os.environ["RANK"]
    run = started_run(folder / f"{name}-{rank}", **{key: given[key] for key in ("runtime", "train", "architecture")})
    with HeldBytes([*run.model.parameters(), *run.model.buffers()]) as held:
        train(run, [], lambda _: None)
    runtime, params = run.plan.params.runtime, run.plan.params.train
    num_processes = int(os.environ["WORLD_SIZE"])
    num_shards = int(os.environ["LOCAL_WORLD_SIZE"]) if runtime.sharding == "hybrid" else num_processes
    num_copies = num_processes // num_shards
    sharing = StateSharing(num_shards, runtime.expert_parallel, runtime.reshard_after_forward, num_copies)
    estimated = process_memory(run.plan.architecture, params, "cpu", sharing).peak_bytes
    peak = torch.tensor(held.peak)
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    if rank == "0":
        (folder / f"{name}.json").write_text(json.dumps({"peak": peak.item(), "estimated": estimated}))


def main(folder: Path) -> None:
    """Run every case."""
    for number in sorted({given["num_processes"] for given in CASES.values()}):
        names = [name for name, given in CASES.items() if given["num_processes"] == number]

        def run_cases(names: list[str] = names) -> None:
            for name in names:
                train_case(folder, name)
            torch.distributed.barrier()

        sharded.fork(number, run_cases)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

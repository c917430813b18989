"""Sharded trainings against one process, over gloo.

As a module, this file is the program that trains: every case on one process, then on several, which are forked from one
that has imported everything. It writes what it measured.
"""

import errno
import json
import os
import shutil
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from dsv3.errors import UserError, is_disk_full
from dsv3.params.optimizers import OPTIMIZERS
from dsv3.training import checkpoint
from dsv3.training.launch import check_sharding
from dsv3.training.optimizer import balanced_owners, rows_per_process
from dsv3.training.sharding import gather_weights, local
from tests.committed import DEFAULTS
from tests.exported_model import write_exported
from tests.training_inputs import WIDE, history, run_python, started_run

EXPERTS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
STEPS = 4
TEACHER = "a model that the program writes"
BEFORE = 2
"""Steps before a checkpoint."""


def case(
    num_processes: int, architecture: dict[str, Any] | None = None, sharding: str = "full", **settings: Any
) -> dict[str, Any]:
    """Return a case: `runtime` and `train` parameters by their names."""
    runtime = {
        name: settings.pop(name)
        for name in ("reshard_after_forward", "cpu_offload", "expert_parallel")
        if name in settings
    }
    train = {"max_steps": STEPS, "gradient_accumulation_steps": 12, "optim": "muon", **settings}
    return {
        "num_processes": num_processes,
        "runtime": {"sharding": sharding, **runtime},
        "train": train,
        "architecture": {**EXPERTS, **(architecture or {})},
    }


CASES: dict[str, dict[str, Any]] = {
    **{name: case(2, optim=name) for name in OPTIMIZERS},
    "bf16 moments": case(2, optim="adamw", adam_moments_dtype="bf16"),
    "checkpointing": case(2, gradient_checkpointing=True),
    "kept after the forward pass": case(2, reshard_after_forward=False),
    "in the CPU's memory": case(2, cpu_offload="parameters"),
    "tied": case(2, {"tie_word_embeddings": True}),
    "two MTP modules": case(4, {"num_nextn_predict_layers": 2}),
    "four": case(4, optim="adamw"),
    "hybrid": case(4, sharding="hybrid"),
    "experts over two": case(2, expert_parallel=2),
    "experts over two, recomputed": case(2, expert_parallel=2, optim="adamw", gradient_checkpointing=True),
    "experts over two, FP8": case(2, WIDE, expert_parallel=2, use_fp8=True, max_steps=1),
    "experts over two of four": case(4, expert_parallel=2),
    "experts over four": case(4, expert_parallel=4),
    "uneven": case(3, max_steps=2),
    "auto": case(2, sharding="auto", max_steps=2),
    "bf16": case(2, precision="bf16", optim="adamw", max_steps=1),
    "fp8": case(2, WIDE, use_fp8=True, max_steps=1),
    "averaged": case(2, ema_decay=0.9),
    "averaged, kept after the forward pass": case(2, ema_decay=0.9, reshard_after_forward=False),
    "averaged, in the CPU's memory": case(2, ema_decay=0.9, cpu_offload="parameters"),
    "noise": case(2, hidden_dropout=0.1, token_replacement=0.1),
    "a teacher": case(2, teachers=[TEACHER], distillation_weight=0.5),
}
WEIGHTS_BOUND = {
    "adamw": 1e-5,
    "four": 1e-5,
    "bf16 moments": 1e-4,
    "uneven": 3e-5,
    "noise": 1e-5,
    "bf16": 1e-4,
    "fp8": 1e-4,
    "experts over two, FP8": 5e-2,
    "experts over two, recomputed": 1e-5,
}
"""Of the norm of the difference to one process, as a share of the weight's norm; 2e-6 for the others.

Gradients are added in another order, which changes them by fp32's rounding. Muon carries that on; AdamW divides a
gradient by its own size, and so makes of a rounding in a gradient near zero a step of another size (as are those of
the embeddings of random tokens, Muon or not); bf16 rounds what is
different to numbers 0.4 % apart, as FP8 to numbers 6 % apart. Replicas (sharding: none) are as far away.
Where experts lie on several processes, an expert has the rows of several micro-batches at once, so FP8 rounds its
weight gradient in other blocks.
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    done = run_python(folder, "-m", "tests.dsv3.training.test_sharding", str(folder), timeout_s=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "measured.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_training_is_that_of_one_process(measured, name):
    found = measured[name]
    assert found["loss"] < 1e-6
    assert found["grad_norm"] < 1e-5
    assert found["load_differences"] == 0
    assert found["weights"] < WEIGHTS_BOUND.get(name, 2e-6), found


@pytest.mark.parametrize("name", [name for name in CASES if "ema_decay" in CASES[name]["train"]])
def test_averages_are_validated_in_the_place_of_sharded_weights_and_then_no_more(measured, name):
    of_averages, of_weights = measured[name]["validation"]
    assert of_averages == pytest.approx(measured[name]["validation_of_one"][0], rel=1e-6)
    assert of_weights == pytest.approx(measured[name]["validation_of_one"][1], rel=1e-6)
    assert abs(of_averages - of_weights) > 1e-3 * of_weights


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("uneven", "hybrid")])
def test_each_process_holds_its_share_of_weights_gradients_and_moments(measured, name):
    for kind, share in measured[name]["shares"].items():
        # Single numbers, such as a norm's or a group's, are not always divisible.
        assert share <= 1.05 / CASES[name]["num_processes"], kind


@pytest.mark.parametrize("name", CASES)
def test_each_process_holds_what_the_sizing_stage_says(measured, name):
    for kind, num_bytes in measured[name]["held"].items():
        # Three processes don't divide the rows of matrices, of which the estimate knows experts only.
        rel = 0.02 if name == "uneven" else 0.001
        assert num_bytes == pytest.approx(measured[name]["estimated"][kind], rel=rel), kind


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_norm_counts_every_expert(measured, name):
    norms = measured[name]["norms"]
    assert norms["norm"] == pytest.approx(norms["of all"], rel=1e-5)
    assert norms["without experts"] < 0.9995 * norms["of all"]  # fifty times the bound above


def test_under_autocast_weights_gradients_and_moments_stay_fp32(measured):
    assert measured["bf16"]["dtypes"] == ["torch.float32"]


def test_auto_is_what_fits_the_device(measured):
    assert measured["auto"]["sharding"] == "full"


def test_in_hybrid_sharding_a_machine_holds_the_whole_training(measured):
    assert max(measured["hybrid"]["shares"].values()) <= 1.05 / 2


def test_fp8_statistics_are_those_of_one_process(measured):
    found, shared = measured["fp8"], measured["experts over two, FP8"]
    assert len(found["statistics"]) > 50
    assert found["missing_statistics"] == []
    assert shared["missing_statistics"] and all(".experts " in key for key in shared["missing_statistics"])
    # After a step whose rounding differs: single numbers fall to the other side of FP8's borders.
    assert found["different_statistics"] == shared["different_statistics"] == []


def test_a_checkpoint_is_the_same_numbers_on_any_number_of_processes(measured):
    digests = measured["checkpoints"]["digests"]
    assert digests.keys() == CHAIN.keys()
    assert len(set(digests.values())) == 1, digests


def test_a_sharded_training_goes_on_bit_for_bit(measured):
    assert measured["checkpoints"]["resumed, own"] == measured["checkpoints"]["uninterrupted, own"]


@pytest.mark.parametrize("ended", ["uninterrupted, beside", "resumed, beside"])
def test_a_checkpoint_written_beside_later_steps_is_that_of_its_step_and_changes_none(measured, ended):
    assert measured["checkpoints"][ended] == measured["checkpoints"]["uninterrupted, own"]


@pytest.mark.parametrize("link", ["2", "3", "6"])
def test_another_number_of_processes_goes_on_with_the_same_batches(measured, link):
    found = measured["checkpoints"]["elastic"][link]
    assert found["steps"] == STEPS
    assert found["same_loads"]  # each token of each step went where it goes on one process
    assert found["weights"] < 2e-6


def test_the_dearest_matrices_go_to_different_owners():
    shapes = [(8, 8), (64, 64), (8, 8), (64, 64), (32, 8), (64, 32)]
    owners = balanced_owners(shapes, 2)
    assert owners[1] != owners[3]
    loads = [sum(r * c * min(r, c) for (r, c), o in zip(shapes, owners, strict=True) if o == owner) for owner in (0, 1)]
    assert max(loads) - min(loads) <= 64 * 32 * 32


@pytest.mark.parametrize(("num_rows", "num_processes"), [(8, 2), (7, 3), (2, 4), (9, 4), (1, 3)])
def test_rows_are_cut_as_torch_cuts_them(num_rows, num_processes):
    chunks = torch.zeros(num_rows, 1).chunk(num_processes)
    assert rows_per_process(num_rows, num_processes) == [
        len(chunks[r]) if r < len(chunks) else 0 for r in range(num_processes)
    ]


@pytest.mark.parametrize(
    ("changes", "num_processes", "told"),
    [
        ({"sharding": "full"}, 1, "runtime.sharding is full; there is one process"),
        ({"cpu_offload": "parameters"}, 2, "runtime.cpu_offload is parameters; needs runtime.sharding"),
        (
            {"sharding": "full", "cpu_offload": "optimizer"},
            2,
            "runtime.cpu_offload is optimizer; needs runtime.sharding",
        ),
        ({"async_save": True}, 2, "runtime.async_save is true; needs runtime.sharding full"),
        ({"sharding": "hybrid"}, 2, "runtime.sharding is hybrid; needs several machines"),
        ({"expert_parallel": 2}, 2, "runtime.expert_parallel is 2; needs runtime.sharding full"),
        ({"sharding": "full", "expert_parallel": 2}, 3, "must divide the 3 processes and the architecture's 8 experts"),
        ({"sharding": "full", "expert_parallel": 16}, 16, "must divide the 16 processes and the architecture's 8 exp"),
        (
            {"sharding": "full", "expert_parallel": 2, "cpu_offload": "parameters"},
            2,
            "not together with runtime.cpu_off",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(changes, num_processes, told, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    runtime = DEFAULTS.runtime.model_copy(update=changes)
    with pytest.raises(UserError, match=told):
        check_sharding(DEFAULTS.model_copy(update={"runtime": runtime}), num_processes, n_routed_experts=8)


def test_a_full_disk_of_another_process_is_one_of_this(monkeypatch, tmp_path):
    def save(*_: object, **__: object) -> None:
        full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "__1_0.distcp"))
        raise CheckpointException("save", {1: (full, StackSummary.extract([]))})

    monkeypatch.setattr(checkpoint, "is_sharded", lambda _: True)
    monkeypatch.setattr(checkpoint.dcp, "save", save)
    with pytest.raises(OSError, match="No space left") as raised:
        checkpoint.write_tensors(tmp_path, torch.nn.Linear(2, 2), None)
    assert is_disk_full(raised.value)


# What the processes do.


def train_case(folder: Path, name: str) -> None:
    """Train a case on one process, or as one of several; the main one writes what it saw."""
    from dsv3.training import plan

    given, num_processes = CASES[name], int(os.environ.get("WORLD_SIZE", "1"))
    train = {**given["train"], **({"teachers": [str(folder / TEACHER)]} if "teachers" in given["train"] else {})}
    if name == "auto":
        plan.total_bytes = lambda _: 1 << 20  # a device of a megabyte
    runtime = given["runtime"] if num_processes > 1 else {}
    own = folder / f"{name}-{num_processes}-{os.environ.get('RANK', '0')}"
    run = started_run(own, runtime=runtime, train=train, architecture=given["architecture"])
    gradients: dict[str, Any] = {}
    clip = run.clip_grad_norm

    def count_gradients(max_norm: float) -> torch.Tensor:
        squares = {
            n: whole(p.grad).square().sum().item() for n, p in run.model.named_parameters() if p.grad is not None
        }
        gradients["of all"] = sum(squares.values()) ** 0.5
        gradients["without experts"] = sum(value for n, value in squares.items() if ".experts." not in n) ** 0.5
        gradients["dtypes"] = {str(p.grad.dtype) for p in run.model.parameters() if p.grad is not None}
        gradients["now"] = num_bytes([local(p.grad) for p in run.model.parameters() if p.grad is not None])
        norm = clip(max_norm)
        gradients["norm"] = norm.item()
        return norm

    run.clip_grad_norm = count_gradients
    rows = history(run)
    moments = [local(v) for s in run.optimizer.state.values() for k, v in s.items() if k != "step"]
    held = {
        "weights": num_bytes([local(p) for p in run.model.parameters()]),
        "gradients": gradients["now"],
        "moments": num_bytes(moments),
    }
    found: dict[str, Any] = {"rows": rows, "held": held, "loads": run.state.step_sums.load_LE}
    found["norms"] = {kind: gradients[kind] for kind in ("norm", "of all", "without experts")}
    found["dtypes"] = gradients["dtypes"] | {str(t.dtype) for t in (*run.model.parameters(), *moments)}
    found |= {"sharding": run.plan.params.runtime.sharding, "estimated": estimated(run)}
    if given["train"].get("use_fp8"):
        from dsv3.training.fp8_hooks import measure_fp8

        statistics = measure_fp8(run)
        found["statistics"] = {
            f"{module} {operand}": values.shares()
            for module, each in statistics.items()
            for operand, values in each.items()
        }
    found["weights"] = whole_weights(run)
    if run.plan.params.train.ema_decay:
        found["validation"], averages = validations(run)
        found["weights"] |= {f"average of {name}": average for name, average in averages.items()}
    if run.accelerator.is_main_process:
        torch.save(found, folder / f"{name}-{num_processes}.pt")


def validations(run: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the validation loss of the averages and then of the weights; and the averages."""
    from dsv3.training.averaging import averaged_weights
    from dsv3.training.hooks import summed_validation_loss

    with averaged_weights(run.model, run.optimizer):
        of_averages = summed_validation_loss(run)
    of_weights = summed_validation_loss(run)  # before anything else that would let go of gathered weights
    with averaged_weights(run.model, run.optimizer):
        return [of_averages, of_weights], whole_weights(run)


def num_bytes(tensors: list[torch.Tensor]) -> int:
    """Return what the tensors take, a storage that several share once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def estimated(run: Any) -> dict[str, int]:
    """Return what the sizing stage says of a process of this training."""
    from dsv3.sizing.sharded import StateSharing, process_memory

    num_processes, per_machine = run.accelerator.num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_shards = {"none": 1, "full": num_processes, "hybrid": per_machine}[run.plan.params.runtime.sharding]
    sharing = StateSharing(num_shards, num_copies=num_processes // num_shards)
    memory = process_memory(run.plan.architecture, run.plan.params.train, "cpu", sharing)
    biases = 12 * sum(router.e_score_correction_bias.numel() for _, router in run.model.routers())
    return {
        "weights": memory.weights_bytes - biases,
        "gradients": memory.gradients_bytes,
        "moments": memory.optimizer_states_bytes,
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor gathered; a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(run: Any) -> dict[str, torch.Tensor]:
    weights = gather_weights(run.model) if run.plan.params.runtime.sharding != "none" else run.model.state_dict()
    return {name: weight.clone() for name, weight in weights.items()}


def reference(name: str) -> str:
    """Return the first case that is the same training; on one process it is run once."""
    parts = ("train", "architecture")
    return next(other for other in CASES if all(CASES[other][part] == CASES[name][part] for part in parts))


def compare(folder: Path, name: str) -> dict[str, Any]:
    """Return how far several processes' training is from one's."""
    one = torch.load(folder / f"{reference(name)}-1.pt")
    several = torch.load(folder / f"{name}-{CASES[name]['num_processes']}.pt")
    pairs = list(zip(several["rows"], one["rows"], strict=True))
    found: dict[str, Any] = {
        value: max(abs(s[value] - o[value]) / o[value] for s, o in pairs) for value in ("loss", "grad_norm")
    }
    distances = {
        n: ((weight - one["weights"][n]).norm() / one["weights"][n].norm().clamp(min=1e-12)).item()
        for n, weight in several["weights"].items()
    }
    found["farthest"] = max(distances, key=lambda n: distances[n])
    found["weights"] = distances[found["farthest"]]
    found |= {"held": several["held"], "estimated": several["estimated"], "sharding": several["sharding"]}
    found |= {"dtypes": sorted(several["dtypes"]), "norms": several["norms"]}
    found["shares"] = {kind: several["held"][kind] / one["held"][kind] for kind in one["held"]}
    loads = (torch.tensor(several["loads"]) - torch.tensor(one["loads"])).abs()
    found["load_differences"] = int(loads.sum())
    if "validation" in one:
        found |= {"validation": several["validation"], "validation_of_one": one["validation"]}
    if "statistics" in one:
        found["statistics"] = sorted(several["statistics"])
        found["missing_statistics"] = sorted(one["statistics"].keys() - several["statistics"].keys())
        found["different_statistics"] = [
            key
            for key, shares in one["statistics"].items()
            if key in several["statistics"]
            if several["statistics"][key] != pytest.approx(shares, rel=0.1, abs=0.01)
        ]
    return found


def digest(run: Any) -> str:
    """Return the SHA-256 of all weights and moments, on the main process."""
    from hashlib import sha256

    total = sha256()
    for name, weight in sorted(whole_weights(run).items()):
        total.update(name.encode() + weight.numpy().tobytes())
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in sorted(run.optimizer.state[parameter].items()):
                total.update(name.encode() + whole(value).float().numpy().tobytes())
    return total.hexdigest()


@dataclass
class Link:
    """A link of the chain, on one of its processes."""

    folder: Path
    name: str

    def started(self) -> Any:
        """Return the training at step 0."""
        own, runtime = self.folder / f"{self.name}-{os.environ.get('RANK', '0')}", CHAIN[self.name][1]
        settings = {"max_steps": STEPS, "gradient_accumulation_steps": 12, "optim": "muon", "ema_decay": 0.9}
        return started_run(own, runtime=runtime, train=settings, architecture=EXPERTS)

    def loaded(self, source: str) -> Any:
        """Return the training at the step of the checkpoint that the link `source` has left."""
        from dsv3.training.checkpoint import load_checkpoint
        from dsv3.training.state import TrainState

        run, folder = self.started(), self.folder / "checkpoints" / source / f"step_{BEFORE}"
        run.state = TrainState.from_json(load_checkpoint(folder, run.model, run.optimizer))
        return run

    def save(self, run: Any, to: str, background: Any = None) -> None:
        folder = self.folder / "checkpoints" / to
        checkpoint.save_checkpoint(folder, run.model, run.optimizer, {}, run.state.to_json(), background)

    def train_while_saving(self, run: Any, to: str) -> None:
        """Train to the end with a checkpoint on the way that is written when the last step is done."""
        from dsv3.training.background import background_writing
        from dsv3.training.loop import Hook, train

        write_shards, ended = checkpoint.write_shards, threading.Event()

        def write_later(*arguments: Any) -> None:
            assert ended.wait(60), "the training waited for its checkpoint"
            write_shards(*arguments)

        def step_done(run: Any) -> None:
            if run.state.step == BEFORE:
                self.save(run, to, background)
            if run.state.step == STEPS:
                assert not (self.folder / "checkpoints" / to / f"step_{BEFORE}").exists()
                ended.set()

        checkpoint.write_shards = write_later
        with background_writing(run.plan.params.runtime.model_copy(update={"async_save": True})) as background:
            train(run, [Hook(1, step_done)], lambda run: None)
        checkpoint.write_shards = write_shards

    def train(self, run: Any, to: str | None = None) -> None:
        """Train to the end; save a checkpoint on the way where its place is given."""
        from dsv3.training.loop import Hook, train

        hook = Hook(BEFORE, lambda run: self.save(run, to) if to and run.state.step == BEFORE else None)
        train(run, [hook], lambda run: None)

    def tell(self, key: str, run: Any) -> None:
        value = digest(run)
        if run.accelerator.is_main_process:
            (self.folder / f"digest {key}").write_text(value)

    def tell_end(self, run: Any) -> None:
        """Write the weights and the sums over all steps of a training that has ended."""
        weights = whole_weights(run)  # a collective
        if run.accelerator.is_main_process:
            torch.save([weights, run.state.to_json()["step_sums"]], self.folder / f"ended {self.name}.pt")


def checkpoint_case(folder: Path, chain: str) -> None:
    """Load the checkpoint that the chain's last link left, say its digest, and save it again for the next one."""
    link = Link(folder, chain)
    if chain == "0":
        uninterrupted = link.started()
        link.train(uninterrupted, "-1")
        link.tell_end(uninterrupted)
    run = link.loaded(str(int(chain) - 1))
    link.tell(chain, run)
    link.save(run, chain)
    if chain in ELASTIC:
        link.train(run)
        link.tell_end(run)
    if chain == "1":  # goes on over the same processes from its own checkpoint
        for name, train in {"own": link.train, "beside": link.train_while_saving}.items():
            uninterrupted = link.started()
            train(uninterrupted, name)
            link.tell(f"uninterrupted, {name}", uninterrupted)
            resumed = link.loaded(name)
            link.train(resumed)
            link.tell(f"resumed, {name}", resumed)


FULL: dict[str, Any] = {"sharding": "full"}
CHAIN: dict[str, tuple[int, dict[str, Any]]] = {
    "0": (1, {}),
    "1": (2, FULL),
    "2": (4, FULL | {"expert_parallel": 2}),
    "3": (3, FULL),
    "4": (2, FULL | {"expert_parallel": 2}),
    "5": (1, {}),
    "6": (4, FULL | {"expert_parallel": 4}),
    "7": (1, {}),
}
"""Link → processes and `runtime`: from one over more of them in every way, and back."""
ELASTIC = ("2", "3", "6")
"""Links whose processes, other than the ones before, train on to the end."""


def distance(folder: Path, link: str) -> dict[str, Any]:
    """Return how far a training that went on over other processes is from one that never left its process."""
    (one, expected), (several, sums) = (torch.load(folder / f"ended {name}.pt") for name in ("0", link))
    weights = max(((several[n] - w).norm() / w.norm().clamp(min=1e-12)).item() for n, w in one.items())
    same_loads = sums["load_LE"] == expected["load_LE"]
    return {"weights": weights, "same_loads": same_loads, "steps": sums["num_steps"]}


def fork(num_processes: int, work: Callable[[], None]) -> None:
    """Do `work` in forked processes, as a launcher would start them; end this program where one fails."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(num_processes):
        child = os.fork()
        if child == 0:
            if num_processes > 1:
                per_machine = 2 if num_processes == 4 else num_processes  # of hybrid sharding
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank % per_machine),
                    "WORLD_SIZE": str(num_processes),
                    "LOCAL_WORLD_SIZE": str(per_machine),
                    "MASTER_ADDR": "localhost",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "none",
                }
            status = 1
            try:
                work()
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)  # without Python's shutdown, which waits for gloo's threads
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        sys.exit(f"{num_processes} processes ended with {statuses}")


def train_and_compare(folder: Path) -> dict[str, Any]:
    """Run every case; return how far each is from its training on one process."""

    def run_cases(num_processes: int, names: list[str]) -> None:
        for name in names:
            train_case(folder, name)
        if num_processes > 1:
            torch.distributed.barrier()

    fork(1, lambda: run_cases(1, sorted({reference(name) for name in CASES})))
    for num_processes in sorted({given["num_processes"] for given in CASES.values()}):
        names = [name for name, given in CASES.items() if given["num_processes"] == num_processes]
        fork(num_processes, lambda n=num_processes, names=names: run_cases(n, names))
    return {name: compare(folder, name) for name in CASES}


def main(folder: Path) -> None:
    """Run every case and write what was measured."""
    write_exported(folder, architecture=EXPERTS)
    (folder / "final_model").rename(folder / TEACHER)
    measured = train_and_compare(folder)
    for link, (num_processes, _) in CHAIN.items():
        fork(num_processes, lambda link=link: checkpoint_case(folder, link))
    digests = {path.name.removeprefix("digest "): path.read_text() for path in folder.glob("digest *")}
    measured["checkpoints"] = {
        "digests": {link: digests[link] for link in CHAIN},
        **{name: digest for name, digest in digests.items() if name not in CHAIN},
        "elastic": {link: distance(folder, link) for link in ELASTIC},
    }
    (folder / "measured.json").write_text(json.dumps(measured, indent=1))
    shutil.rmtree(folder / "checkpoints")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

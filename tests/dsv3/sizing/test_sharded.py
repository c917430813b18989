"""What a process of several needs; what it really holds is measured in tests/dsv3/training/test_sharding.py."""

import subprocess
import sys
from collections import Counter

import pytest

from dsv3.params.architecture import Architecture, read_architecture
from dsv3.sizing.machines import MACHINES
from dsv3.sizing.memory import training_memory
from dsv3.sizing.parameters import num_mtp_parameters, num_parameters
from dsv3.sizing.report import process_table
from dsv3.sizing.sharded import StateSharing, chosen_sharding, process_memory, sharded_memory, ways_of_sharing
from tests.committed import DEFAULTS, PROJECT
from tests.training_inputs import ROOT

MINI = read_architecture(PROJECT / "mini_model" / "config.json")
LITE = {
    "vocab_size": 102_400,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1_408,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
}
"""DeepSeek-V2-Lite's sizes, over those of config.json."""
V3 = {
    "hidden_size": 7_168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "intermediate_size": 18_432,
    "moe_intermediate_size": 2_048,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1_536,
}
"""DeepSeek-V3's sizes, over those of config.json."""
SHAPES: dict[str, tuple[Architecture, tuple[int, ...]]] = {
    "5.69B": (MINI, (8, 16)),
    "16B": (MINI.model_copy(update=LITE), (8, 16)),
    "671B": (MINI.model_copy(update=V3), (256, 1_024)),
}
FRUGAL = DEFAULTS.train.model_copy(
    update={
        "optim": "adamw",
        "adam_moments_dtype": "bf16",
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 1,
        "block_size": 4_096,
    }
)
H100 = next(machine for machine in MACHINES if machine.name == "H100 80 GB")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tables_of_the_documentation_are_the_estimates(shape):
    a, numbers = SHAPES[shape]
    assert round((num_parameters(a) + num_mtp_parameters(a)) / 1e9, 2 if shape == "5.69B" else 0) == float(shape[:-1])
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    for number in numbers:
        lines = [f"{shape} on {number:,} processes:", "", *process_table(a, FRUGAL, number)]
        assert "\n".join(lines) in text, "\n".join(lines)


@pytest.mark.parametrize("num_processes", [2, 4, 8, 16])
def test_a_process_holds_its_share_of_what_is_always_there(num_processes):
    whole, own = (
        training_memory(MINI, FRUGAL, "cuda"),
        sharded_memory(MINI, FRUGAL, "cuda", StateSharing(num_processes)),
    )
    for kind in ("weights_bytes", "gradients_bytes", "optimizer_states_bytes"):
        assert 1 / num_processes <= getattr(own, kind) / getattr(whole, kind) < 1.001 / num_processes
    assert own.activations_bytes == whole.activations_bytes
    assert own.peak_bytes < whole.peak_bytes


def test_whole_experts_are_held_where_they_are_not_divisible():
    experts = Counter(routed_experts=64 * 100)
    assert StateSharing(48).own(MINI, experts) == StateSharing(32).own(MINI, experts) == 2 * 100


def test_experts_that_stay_where_they_are_are_not_gathered():
    small = MINI.model_copy(update={"vocab_size": 1_000})
    whole, rows, apart = (sharded_memory(small, FRUGAL, "cuda", StateSharing(8, n)).gathered_bytes for n in (1, 4, 8))
    experts = 4 * 64 * 3 * 2_048 * 512
    assert whole - rows == 4 * experts * 3 // 4  # two layers' weights, two layers' gradients
    assert whole - apart > 3.8 * experts  # then most is gathered in the dense layer


def test_kept_weights_are_gathered_all():
    kept, freed = (sharded_memory(MINI, FRUGAL, "cuda", StateSharing(8, 1, again)) for again in (False, True))
    assert kept.peak_bytes - freed.peak_bytes > 0.75 * training_memory(MINI, FRUGAL, "cuda").weights_bytes


@pytest.mark.parametrize(
    ("shape", "processes", "chosen"),
    [
        ("5.69B", (1, 1), "none"),
        ("5.69B", (8, 8), "none"),
        ("16B", (8, 8), "full"),
        ("16B", (16, 8), "hybrid"),
        ("16B", (16, 1), "full"),
        ("16B", (12, 8), "full"),  # machines of unequal numbers
        ("671B", (1_024, 8), "full"),
    ],
)
def test_auto_exchanges_as_little_as_fits(shape, processes, chosen):
    a, _ = SHAPES[shape]
    assert chosen_sharding(a, FRUGAL, "cuda", processes, H100.usable_bytes) == chosen


@pytest.mark.parametrize("sharing", [StateSharing(1, num_copies=4), StateSharing(2, num_copies=2), StateSharing(4)])
def test_gradients_are_accumulated_where_a_process_makes_several_of_a_steps_passes(sharing):
    once, twice = (
        process_memory(MINI, FRUGAL.model_copy(update={"gradient_accumulation_steps": number}), "cuda", sharing)
        for number in (4, 8)
    )
    assert twice.peak_bytes - once.peak_bytes > 0.25 * once.gradients_bytes
    assert once.holds_gradients == (sharing.num_shards == 1)  # buckets, which are there from the beginning
    assert twice.holds_gradients


def test_one_process_has_nothing_to_share():
    assert list(ways_of_sharing(MINI, 1)) == ["none"]
    assert list(ways_of_sharing(MINI, 16)) == ["none", "hybrid", "full", "full, expert_parallel 16"]


def test_the_stage_shows_what_each_process_would_need(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-m", "stages.estimate_size", "--output", str(tmp_path), "--ranks", "4"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    ).stdout
    assert "GiB on each of 4 processes, estimated:" in shown
    assert "| full, expert_parallel 4 |" in shown

"""Every way of sharing a training × optimizer × precision × form, over twenty steps, beside one process.

`python -m tests.stress.sharding` prints a line for each, as it comes, then the worst differences as a table; the exit
status is 1 where one exceeds its bound. `--only` is a regular expression of names, `--steps` shortens it. An hour on
two cores, and minutes on many; tests/dsv3/training/test_sharding.py samples it.
"""

import argparse
import re
import tempfile
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

from dsv3.params import optimizers
from tests.dsv3.training import test_sharding as sharded
from tests.training_inputs import WIDE

WAYS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "2 full": (2, "full", {}),
    "4 full": (4, "full", {}),
    "3 full": (3, "full", {}),
    "2 x 2 hybrid": (4, "hybrid", {}),
    "experts over 2": (2, "full", {"expert_parallel": 2}),
    "experts over 2 of 4": (4, "full", {"expert_parallel": 2}),
    "2 in the CPU's memory": (2, "full", {"cpu_offload": "parameters"}),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    **{name: {"optim": name} for name in optimizers.OPTIMIZERS},
    "bf16 moments": {"optim": "adamw", "adam_moments_dtype": "bf16"},
}
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "fp8": {"use_fp8": True}}
FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (0, {}),
    "checkpointing": (0, {"gradient_checkpointing": True}),
    "mtp": (1, {}),
}
"""Each step has twelve micro-batches, so every process accumulates."""

BOUNDS = {("muon", "fp32"): 1e-6, ("adamw", "fp32"): 1e-5, ("bf16 moments", "fp32"): 1e-4}
"""Of the loss's relative difference in every step, where every token goes to the same experts. FP8 rounds what differs
in fp32's last bit to numbers 6 % apart, and twenty steps amplify that: it is shown, and has no bound here."""

FLIPPED = 10
"""Times the bound, where tokens have gone to other experts. A router's two best scores may lie within a rounding of
each other; then the smallest difference sends a token elsewhere, and the biases, which move by signs, follow. On one
process, weights changed by 6e-8 of themselves do the same (docs/log.md)."""


def cases(optimizer: str, precision: str, form: str, steps: int) -> dict[str, dict[str, Any]]:
    """Return the cases of one training by name: it is shared in every way."""
    num_mtp, settings = FORMS[form]
    architecture = {"num_nextn_predict_layers": num_mtp, **(WIDE if precision == "fp8" else {})}
    train = {**OPTIMIZERS[optimizer], **PRECISIONS[precision], **settings, "max_steps": steps}
    return {
        f"{way}, {optimizer}, {precision}, {form}": sharded.case(number, architecture, sharding, **runtime, **train)
        for way, (number, sharding, runtime) in WAYS.items()
    }


def measured(folder: Path, every: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Train the one training on one process and in each way of `every`; return how far they are apart."""
    sharded.CASES.clear()
    sharded.CASES.update(every)
    return sharded.train_and_compare(folder)


def main() -> int:
    """Run what `--only` names; print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression that the names must match")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    worst: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    failed = 0
    for optimizer, precision, form in product(OPTIMIZERS, PRECISIONS, FORMS):
        every = cases(optimizer, precision, form, options.steps)
        chosen = {name: case for name, case in every.items() if re.search(options.only, name)}
        if not chosen:
            continue
        with tempfile.TemporaryDirectory(prefix="dsv3-sharding-") as folder:
            for name, found in measured(Path(folder), chosen).items():
                bound = BOUNDS.get((optimizer, precision), float("inf"))
                is_over = found["loss"] > bound * (FLIPPED if found["load_differences"] else 1)
                failed += is_over
                shown = {kind: found[kind] for kind in ("loss", "grad_norm", "weights")}
                row = worst[name.split(",")[0], optimizer, precision]
                row.update({kind: max(row.get(kind, 0.0), value) for kind, value in shown.items()})
                told = ", ".join(f"{kind} {value:.1e}" for kind, value in shown.items())
                print(f"{name}: {told}, {found['load_differences']} loads{' FAILED' * is_over}", flush=True)
    print("| way | optimizer | precision | loss | gradient norm | weights |\n| --- | --- | --- | ---: | ---: | ---: |")
    for names, row in worst.items():
        print("| " + " | ".join([*names, *(f"{row[kind]:.1e}" for kind in ("loss", "grad_norm", "weights"))]) + " |")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""Results that no training made."""

from dataclasses import replace

from benchmarks.studies.definition import Study, Variant
from benchmarks.studies.results import Result

STUDY = Study(
    document="page.md",
    figure="dots",
    baseline="base",
    goal_percent=0.25,
    seeds=[1, 2, 3],
    variants={name: Variant(part=name.capitalize(), change=f"changed {name}") for name in ("base", "other", "absent")},
)
RESULT = Result(
    name="",
    variant="base",
    seed=1,
    validation_loss=4.0,
    nats_per_char=1.5,
    bits_per_byte=2.0,
    max_vio=0.25,
    max_vio_batch=0.5,
    dead_experts=0,
    tokens_per_s=1000.0,
    num_parameters=1234,
    num_active=1000,
    num_embedding=400,
    num_steps=100,
    num_tokens=2000,
    num_epochs=2.0,
    computed="fp32",
    conditions="commit `abcdef0`",
    losses={10: 4.5, 20: 4.25},
    validation_losses={20: 4.0},
)


def results(differences: list[float]) -> list[Result]:
    """Return a baseline run per seed, and a run of `other` whose held-out loss lies `differences` above it."""
    found = []
    for seed, difference in enumerate(differences, start=1):
        base = replace(RESULT, name=f"study-base-{seed}", seed=seed, nats_per_char=1.5 + seed / 10)
        score = base.nats_per_char + difference
        found += [base, replace(base, name=f"study-other-{seed}", variant="other", nats_per_char=score)]
    return found

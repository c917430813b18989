"""What each stage shows, of which trackers and the report make what they show: one row of `SHOWN` per stage.

A stage that shows nothing has no row. That the rows are stages of dvc.yaml, a contract checks.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dsv3.artifacts import REMEDY
from dsv3.errors import UserError
from dsv3.params.read import read_yaml
from dsv3.scores import SCORES
from dsv3.tracking.events import Event
from dsv3.tracking.results import evaluate_events, sample_events, train_events

Lines = list[tuple[str, str]]
"""What it is about, and the value as text."""

TRAINING = "train"
"""The stage that begins a run; the others add to it."""
TRAINED = ("seed", "model", "train")
"""Sections of params.yaml that the training's stage is run with."""
TEXT = ("data", "tokenize")
"""Those of the stages before it, which may run again, to the same text, without it."""


def model_lines(size: Mapping[str, Any], record: Mapping[str, Any]) -> Lines:
    """Return which model it is, and how large."""
    lines = []
    if record:
        lines.append(("configuration", record["params"]["model"]["config"]))
    if size:
        total, active = size["parameters_total"], size["parameters_active"]
        lines.append(("parameters", f"{total:,} ({active:,} active per token)"))
    return lines


def training_lines(train: Mapping[str, Any], record: Mapping[str, Any]) -> Lines:
    """Return which run it is, how much was trained, on what, and how fast."""
    lines = []
    if record:
        dvc = record["dvc"]
        dirty = " with uncommitted changes" if dvc.get("git_dirty") else ""
        lines.append(("text", f"{dvc.get('data_source') or 'unknown'}"))
        lines.append(("run", f"{record['name']} (Aim {record['aim_run_hash'] or 'off'})"))
        lines.append(("commit", f"{(dvc.get('git_sha') or 'none')[:12]}{dirty}"))
    if train:
        steps = f"{train['tokens_seen']:,} in {train['step']:,} steps, {train['epoch']:.2f} epochs"
        lines.append(("tokens seen", steps))
        lines.append(("trained on", f"{train['device']} x {train['num_processes']}, {train['precision']}"))
        lines.append(("speed", f"{train['tokens_per_s']:,.0f} tokens/s; {_duration(train['train_s'])} in all"))
    return lines


def score_lines(evaluate: Mapping[str, Any], record: Mapping[str, Any]) -> Lines:
    """Return how well the model predicts, how its experts are balanced, and how many drafts would be accepted."""
    if not evaluate:
        return []
    heldout, router = evaluate["heldout"], evaluate["router"]
    lines = [
        ("held-out loss", f"{heldout['nats_per_char']:.4f} nats/char, {heldout['bits_per_byte']:.4f} bits/byte"),
        ("", f"{heldout['nats_per_token']:.4f} nats/token, perplexity {heldout['perplexity']:.2f}"),
    ]
    if router:
        worst, dead = router["max_vio_global_max"], router["dead_experts"]
        lines.append(("expert balance", f"MaxVio {worst:.3f} in the worst layer, {dead} dead experts"))
    if module := evaluate.get("mtp", {}).get("depth_1"):
        lines.append(("first MTP module", f"{module['mtp_acceptance']:.1%} of its drafts would be accepted"))
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


@dataclass(frozen=True)
class Shown:
    """What is shown of one stage."""

    output: str
    """Name of the output that the events are read from, with what lies beside it."""

    events: Callable[[Path, int], Iterator[Event]] | None = None
    """Function of that output, and of the training's last step, that yields what trackers are shown."""

    charts: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    """What trackers draw of the stage's metrics.json: by section, the subset and the names."""

    lines: Callable[[Mapping[str, Any], Mapping[str, Any]], Lines] | None = None
    """Function of the stage's metrics.json and the training's run.json, each empty where it is not there, that returns
    what the report says of it."""


# The validation during training scores separate blocks, evaluate a sliding window: they must not share a curve, so
# trackers put the stage beside the subset.
SHOWN: Mapping[str, Shown] = MappingProxyType(
    {
        "estimate_size": Shown("metrics.json", lines=model_lines),
        TRAINING: Shown("run.json", train_events, lines=training_lines),  # its curves are its tables
        "evaluate": Shown(
            "metrics.json",
            evaluate_events,
            charts={
                "validation": ("val", tuple(SCORES)),
                "test": ("test", tuple(SCORES)),
                "heldout": ("heldout", tuple(SCORES)),
                "mtp.depth_1": ("heldout", ("mtp_acceptance",)),
            },
            lines=score_lines,
        ),
        "sample": Shown("samples.md", sample_events, charts={"": ("sample", ("draft_acceptance", "tokens_per_pass"))}),
    }
)
"""By stage, in the order in which they are shown."""


def charted(stage: str, metrics: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Return (subset, name, value) of what is drawn of a stage's metrics; what they lack is left out.

    Raises `UserError` for what a stage never writes, as in a file that was damaged.
    """
    found: list[tuple[str, str, float]] = []
    for section, (subset, names) in SHOWN[stage].charts.items() if stage in SHOWN else ():
        values: Mapping[str, Any] = metrics
        for key in filter(None, section.split(".")):
            values = values.get(key, {})
            if not isinstance(values, Mapping):
                raise UserError(f"metrics.json of {stage}: {section} is {values!r:.60}; must be a mapping; {REMEDY}")
        for name in filter(values.__contains__, names):
            if not isinstance(value := values[name], int | float):
                raise UserError(f"metrics.json of {stage}: {name} is {value!r:.60}; must be a number; {REMEDY}")
            found.append((subset, name, float(value)))
    return found


def training_record(results: Path) -> Path:
    """Return the run.json of the training below the stages' results."""
    return results / TRAINING / SHOWN[TRAINING].output


def made_with(record: Mapping[str, Any], lock_file: Path) -> dict[str, Any]:
    """Return the sections of params.yaml that the results were made with, as far as it is known.

    params.yaml may have been edited since. The training's sections are those of its run.json; of the others, dvc.lock
    tells, and of the data's else the run.json too.
    """
    recorded = record["params"]
    before, own = ({name: recorded[name] for name in names if name in recorded} for names in (TEXT, TRAINED))
    try:
        stages = read_yaml(lock_file)["stages"] if lock_file.is_file() else {}
        model = _outputs(stages)
        sections = [entry.get("params", {}).get("params.yaml", {}) for entry in stages.values() if _is_of(entry, model)]
        locked = {name: value for section in sections for name, value in section.items()}
    except (UserError, LookupError, TypeError, AttributeError):  # such as one amid a merge; it is DVC's to judge
        locked = {}
    return before | locked | own


def _outputs(stages: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the digests of what the training left."""
    return {out["path"]: out.get("md5") for out in stages.get(TRAINING, {}).get("outs", [])}


def _is_of(entry: Mapping[str, Any], model: Mapping[str, str | None]) -> bool:
    """Return whether a stage took nothing of an earlier training's."""
    return all(model.get(dep["path"], dep.get("md5")) == dep.get("md5") for dep in entry.get("deps", []))


def valid_events(lock_file: Path, params: Mapping[str, Any], step: int) -> Iterator[Event]:
    """Yield what later stages left, where dvc.lock says that it was made from this model and `params`.

    A dvc.lock that can't be read, such as one amid a merge, says nothing; it is DVC's to judge.
    """
    if not lock_file.is_file():
        return
    try:
        found = list(_valid_places(read_yaml(lock_file)["stages"], params))
    except (UserError, LookupError, TypeError, AttributeError):
        return
    for place, events in found:
        yield from events(place, step)


def _valid_places(
    stages: Mapping[str, Any], params: Mapping[str, Any]
) -> Iterator[tuple[Path, Callable[[Path, int], Iterator[Event]]]]:
    """Yield what the later stages have made from the model and `params`, and what reads it."""
    model = _outputs(stages)
    for stage, shown in SHOWN.items():
        if shown.events is None or stage == TRAINING:
            continue
        entry = stages.get(stage, {})
        made_with = entry.get("params", {}).get("params.yaml", {})
        sources = {dep["path"]: dep.get("md5") for dep in entry.get("deps", []) if dep["path"] in model}
        places = [Path(out["path"]) for out in entry.get("outs", []) if Path(out["path"]).name == shown.output]
        is_valid = all(params.get(section) == value for section, value in made_with.items())
        if is_valid and sources and sources.items() <= model.items():
            yield from ((place, shown.events) for place in places)

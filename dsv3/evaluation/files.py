"""Where an evaluation is written: files in a folder, which `dsv3.tracking.results` shows in the trackers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3.artifacts import write_json, write_text
from dsv3.evaluation.figures import expert_load, loss_by_position, save_figure
from dsv3.evaluation.sliding_window import Evaluation

FILES = ("metrics.json", "headline.json", "loss_by_position.tsv", "expert_load.tsv", "figures")


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write metrics.json, headline.json, loss_by_position.tsv, expert_load.tsv and figures/*.png."""
    heldout = evaluation.scores["heldout"]
    title = f"Loss by position, held-out text ({heldout.tokens:,} tokens)"
    curve = loss_by_position(evaluation.positions.means(), heldout.nats / heldout.tokens, title)
    save_figure(curve, folder / "figures" / "loss_by_position.png")
    if evaluation.loads:
        save_figure(expert_load(evaluation.loads, "Expert load, held-out text"), folder / "figures" / "expert_load.png")
    write_text(folder / "loss_by_position.tsv", evaluation.position_table())
    write_text(folder / "expert_load.tsv", evaluation.load_table())
    metrics = evaluation.metrics()
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "headline.json", headline(metrics))


def headline(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, int | float]:
    """Return the few numbers of an evaluation by which runs are compared; a dense model has no expert load."""
    numbers = {"heldout": metrics["heldout"]["nats_per_char"]}
    if router := metrics["router"]:
        numbers |= {"max_vio": round(router["max_vio_global_max"], 3), "dead_experts": router["dead_experts"]}
    return numbers


def summary(evaluation: Evaluation) -> str:
    """Return a line per split, and one per MTP module."""
    units = {"nats_per_token": "nats/token", "nats_per_char": "nats/char", "bits_per_byte": "bits/byte"}
    metrics = evaluation.metrics()
    lines = [
        f"{split:<11}" + "  ".join(f"{metrics[split][name]:.4f} {unit}" for name, unit in units.items())
        for split in evaluation.scores
    ]
    lines += [
        f"{f'mtp {module}':<13}{row['mtp_acceptance']:.1%} accepted, {row['nats_per_token']:.4f} nats/token"
        for module, row in metrics.get("mtp", {}).items()
    ]
    return "\n".join(lines)

"""From results to Markdown: a pure function, so that a document says nothing that its numbers do not.

Every sentence about a variant is made by rule from its paired differences (`benchmarks.studies.statistics`); the words
about what a variant is come from its definition, which holds no results.
"""

from collections.abc import Iterable, Sequence

from benchmarks.studies.definition import Study
from benchmarks.studies.results import Result
from benchmarks.studies.statistics import Value, differences, of_variant, pairs, ratios, relative_gap
from dsv3.statistics import Sample

HEADER = (
    "variant",
    "seeds",
    "validation, nats/token",
    "held-out, nats/char",
    "held-out, bits/byte",
    "difference, nats/char",
    "MaxVio, held-out",
    "MaxVio, last batches",
    "dead experts",
    "parameters (active)",
    "speed",
)


def section(name: str, study: Study, results: Sequence[Result], how: str, figure: str) -> str:
    """Return the generated part of a study's page; `how` says on what and beside what the runs were made."""
    if not results:
        return f"No run of this study has finished yet: `python -m benchmarks.study run {name}` makes them.\n"
    parts = [
        f"{conditions(study, results, how)}\n\n{how_to_read(name, study)}",
        table(HEADER, (variant_row(study, results, variant) for variant in finished(study, results))),
        f"![{name}]({figure})",
        "\n".join(f"- {sentence(study, results, variant)}" for variant in finished(study, results)),
        "Every run:",
        runs_table(study, results),
    ]
    return "\n\n".join(parts) + "\n"


def finished(study: Study, results: Sequence[Result]) -> list[str]:
    """Return the variants that have a result, in the study's order."""
    return [variant for variant in study.variants if of_variant(results, variant)]


def conditions(study: Study, results: Sequence[Result], how: str) -> str:
    """Return what the numbers depend on, and how many runs there are of how many."""
    total = len(study.seeds) * len(study.variants)
    steps, tokens = _range(results, lambda r: r.num_steps), _range(results, lambda r: r.num_tokens)
    conditions = "; ".join(sorted({result.conditions for result in results}))
    missing = "" if len(results) == total else " **The study is not complete.**"
    return (
        f"{len(results)} of {total} runs have finished.{missing} Each trained for {steps} steps on {tokens} tokens: "
        f"{conditions}; {how}."
    )


def how_to_read(name: str, study: Study) -> str:
    """Return how the table of differences is to be read."""
    return (
        f"± is the standard deviation over the seeds. Differences and speeds are taken seed by seed against "
        f"`{study.baseline}`. Speeds are indicative only: the trainings ran beside each other. MaxVio is the worst "
        f"layer's. A run is named `{name}-<variant>-<seed>`, in `dvc exp show` and in Aim."
    )


def variant_row(study: Study, results: Sequence[Result], variant: str) -> list[str]:
    """Return the cells of one variant."""
    own, base = of_variant(results, variant), study.baseline

    def cell(value: Value, digits: int) -> str:
        return plus_minus(Sample(tuple(map(value, own))), digits)

    difference = differences(results, variant, base, lambda r: r.nats_per_char)
    speed = ratios(results, variant, base, lambda r: r.tokens_per_s)
    is_compared = variant != base and difference.values
    return [
        f"`{variant}`{emulated(own)}",
        str(len(own)),
        cell(lambda r: r.validation_loss, 4),
        cell(lambda r: r.nats_per_char, 4),
        cell(lambda r: r.bits_per_byte, 4),
        plus_minus(difference, 4, sign="+") if is_compared else "",
        cell(lambda r: r.max_vio, 2),
        cell(lambda r: r.max_vio_batch, 2),
        cell(lambda r: r.dead_experts, 1) if any(r.dead_experts for r in own) else "0",
        f"{own[0].num_parameters:,} ({own[0].num_active:,})",
        f"{speed.mean:.2f}" if is_compared else "",
    ]


def emulated(results: Iterable[Result]) -> str:
    """Return what marks runs that only emulated their precision."""
    return ", emulated" if any("emulated" in result.computed for result in results) else ""


def sentence(study: Study, results: Sequence[Result], variant: str) -> str:
    """Return what a variant is and what it did, in numbers."""
    own, described = of_variant(results, variant), study.variants[variant]
    computed, usual = ({result.computed for result in runs} for runs in (own, of_variant(results, study.baseline)))
    head = f"**{described.part}** (`{variant}`): {described.change}."
    if variant == study.baseline or computed != usual:
        head += f" Computed as {', '.join(sorted(computed))}."
    if variant == study.baseline:
        return head
    loss = differences(results, variant, study.baseline, lambda r: r.nats_per_char)
    vio = differences(results, variant, study.baseline, lambda r: r.max_vio)
    if not loss.values:
        return f"{head} No seed has finished both here and in `{study.baseline}`."
    balance = effect("MaxVio on the held-out text", vio, "", 2)
    return " ".join(
        [head, effect("The held-out loss", loss, " nats/char", 4), balance, *_goal(study, results, variant)]
    )


def effect(what: str, difference: Sample, unit: str, digits: int) -> str:
    """Return the sentence about one paired difference: risen, fallen, or within what the seeds' noise explains."""
    size = f"{abs(difference.mean):.{digits}f}{unit}"
    if difference.half_interval is None:
        return f"{what} changed by {difference.mean:+.{digits}f}{unit}, in a single seed: that is no evidence."
    low, high = (difference.mean + side * difference.half_interval for side in (-1, 1))
    interval = f"95 % interval {low:+.{digits}f} to {high:+.{digits}f}, {len(difference.values)} seeds"
    if not difference.is_established:
        return f"{what} did not change beyond noise: {difference.mean:+.{digits}f}{unit} ({interval})."
    return f"{what} {'rose' if difference.mean > 0 else 'fell'} by {size} ({interval})."


def _goal(study: Study, results: Sequence[Result], variant: str) -> Iterable[str]:
    """Yield the sentences about the relative gap, where the study has a goal for it."""
    if study.goal_percent is None:
        return
    curves = [relative_gap(own, other) for own, other in pairs(results, variant, study.baseline)]
    gaps = {
        "The final validation loss": gap_percent(results, variant, study.baseline),
        "The smoothed training loss, at the end,": Sample(tuple(list(curve.values())[-1] for curve in curves)),
    }
    for what, gap in gaps.items():
        goal, half = study.goal_percent, gap.half_interval
        verdict = "within" if abs(gap.mean) < goal else "beyond"
        interval = "in a single seed" if half is None else f"95 % interval ± {half:.3f}"
        doubt = ""
        if half is not None and abs(gap.mean) < goal <= abs(gap.mean) + half:
            doubt = ", though the interval reaches beyond it"
        elif half is not None and abs(gap.mean) - half < goal <= abs(gap.mean):
            holds_zero = abs(gap.mean) < half
            doubt = f", though {'zero lies within the interval' if holds_zero else 'the interval reaches within it'}"
        yield (
            f"{what} lies {gap.mean:+.3f} % ({interval}) from `{study.baseline}`'s, "
            f"{verdict} the goal of {goal:g} %{doubt}."
        )


def gap_percent(results: Sequence[Result], variant: str, baseline: str) -> Sample:
    """Return the relative difference of the final validation loss by seed, in percent."""
    found = ratios(results, variant, baseline, lambda r: r.validation_loss)
    return Sample(tuple(100 * (ratio - 1) for ratio in found.values))


def runs_table(study: Study, results: Sequence[Result]) -> str:
    """Return one row per run."""
    header = ("run", "validation, nats/token", f"gap to `{study.baseline}`, %", "held-out, nats/char", "MaxVio")
    rows = []
    for result in results:
        others = [other for own, other in pairs(results, result.variant, study.baseline) if own is result]
        is_compared = others and result.variant != study.baseline
        gap = f"{100 * (result.validation_loss / others[0].validation_loss - 1):+.3f}" if is_compared else ""
        cells = f"{result.validation_loss:.4f}", gap, f"{result.nats_per_char:.4f}", f"{result.max_vio:.2f}"
        rows.append([f"`{result.name}`", *cells])
    return table(header, rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:" for _ in header[1:]]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def plus_minus(sample: Sample, digits: int, sign: str = "") -> str:
    """Return mean ± standard deviation; without the latter for a single value."""
    mean = f"{sample.mean:{sign}.{digits}f}"
    return mean if sample.deviation is None else f"{mean} ± {sample.deviation:.{digits}f}"


def _range(results: Sequence[Result], value: Value) -> str:
    """Return the value of all results, or the least and the largest."""
    low, high = min(map(value, results)), max(map(value, results))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"

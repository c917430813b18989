"""Runs side by side: what was chosen otherwise, and what that did to the headline numbers.

A run is whatever DVC can name: an experiment, a commit, a branch, or the workspace. DVC reads its parameters, its
architecture and its metrics; this module only puts them next to each other.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import md5
from typing import Any

from dsv3.artifacts import REMEDY
from dsv3.errors import UserError, one_line
from dsv3.markdown import escaped
from dsv3.statistics import Sample
from dsv3.tracking.metrics import HEADLINE
from dsv3.tracking.stages import TRAINING

WORKSPACE = "workspace"
"""DVC's name for what is checked out, with its changes."""
WIDTH = 80
"""Of a terminal."""
SHOWN_PATHS = 3
"""Most files in a note."""
LEGEND = (
    "×: runs that differ in their seed only. ±: 95 % interval of their mean.\n"
    "Differences are taken between runs of the same seed, where there are such."
)


@dataclass(frozen=True)
class Run:
    """One run as DVC knows it."""

    name: str
    params: Mapping[str, Any]
    """Flat: `section.key` of params.yaml and the keys of the architecture, without `runtime`: it shapes nothing."""
    numbers: Mapping[str, float]
    """The headline numbers that it has."""

    stale: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By stage, the parameters, and the architecture's file, that are not those that the numbers were made with."""

    origin: Mapping[str, str | None] = field(default_factory=dict)
    """Digests of the code and the data that the training was made from; none without a dvc.lock."""

    @property
    def choices(self) -> dict[str, Any]:
        """Return all parameters but the seed."""
        return {name: value for name, value in self.params.items() if name != "seed"}


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only; most are of one run."""

    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """Return the first run's name, and of how many runs the group is."""
        return self.runs[0].name + (f" ×{len(self.runs)}" if len(self.runs) > 1 else "")

    def chosen(self, name: str) -> str:
        """Return a parameter as text: one value, or every run's seed."""
        return ", ".join(dict.fromkeys(str(run.params.get(name, "–")) for run in self.runs))

    def by_seed(self, number: str) -> dict[Any, float]:
        """Return a headline number of each run that has it, by seed."""
        return {run.params.get("seed"): run.numbers[number] for run in self.runs if number in run.numbers}


def read_runs(names: Sequence[str]) -> list[Run]:
    """Return runs by the names of experiments, commits, branches, or `workspace`; `UserError` where DVC knows none."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    revisions = list(names)
    try:
        with Repo() as repo:
            params = repo.params.show(revs=revisions, hide_workspace=False)
            numbers = repo.metrics.show(revs=revisions, hide_workspace=False)
            locked = {}
            for found in repo.brancher(revs=revisions):
                stages = _locked(repo)
                locked[found] = {"stages": stages, "edited": _edited_architectures(repo, stages)}
    except DvcException as error:
        raise UserError(f"{error}; dvc exp list names the experiments") from None
    return [_run(name, _of_revision(params, name), _of_revision(numbers, name), _entry(locked, name)) for name in names]


def _locked(repo: Any) -> dict[str, Any]:
    """Return the stages in dvc.lock of the revision that `repo` stands at; none where DVC can't read it.

    That, DVC has then told in place of parameters and numbers.
    """
    from dvc.dvcfile import LOCK_FILE, Lockfile
    from dvc.exceptions import DvcException

    try:
        return Lockfile(repo, repo.fs.join(repo.root_dir, LOCK_FILE)).load().get("stages", {})
    except DvcException:
        return {}


def _edited_architectures(repo: Any, stages: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return, by stage, the architecture's file where the revision `repo` stands at has another than it was run with.

    One that is not there is told where it is read.
    """
    found = {}
    for stage, entry in stages.items():
        path = str(flat(entry.get("params", {}).get("params.yaml", {})).get("model.config", ""))
        digests = {dep["path"]: dep.get("md5") for dep in entry.get("deps", [])}
        place = repo.fs.join(repo.root_dir, path)
        if path in digests and repo.fs.exists(place):
            digest = md5(repo.fs.read_bytes(place), usedforsecurity=False).hexdigest()
            found |= {stage: [path]} if digest != digests[path] else {}
    return found


def _entry(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what was found in a revision; names of one commit share an entry."""
    return next((each for names, each in found.items() if name in names.split(",")), {})


def _of_revision(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what DVC found in the files of a revision, all files together.

    Files that are not there have nothing; raises `UserError` for a revision, or a file of it, that DVC can't read.
    """
    from dvc.utils.serialize import ParseError

    entry = _entry(found, name)
    files: Mapping[str, Any] = entry.get("data", {})
    errors = {f" {path}:": file.get("error") for path, file in files.items()} | {"": entry.get("error")}
    for where, error in errors.items():
        if isinstance(error, ParseError) or (error is not None and not where):  # of the whole, DVC names the place
            raise UserError(f"{name}:{where} {one_line(error)}; git checkout brings a file back")
    return {key: value for file in files.values() for key, value in file.get("data", {}).items()}


def _run(name: str, params: Mapping[str, Any], numbers: Mapping[str, Any], locked: Mapping[str, Any]) -> Run:
    shaping = {key: value for key, value in params.items() if key != "runtime"}
    found = {key: numbers[key] for key in HEADLINE if key in numbers}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{name}: headline.json: {key} is {value!r:.60}; must be a number; {REMEDY}")
    architecture = shaping.get("model", {}).get("config")  # its fields are shown
    stages: Mapping[str, Any] = locked.get("stages", {})
    deps = {dep["path"]: dep.get("md5") for dep in stages.get(TRAINING, {}).get("deps", [])}
    origin = {path: digest for path, digest in deps.items() if path != architecture}
    stale, edited = stale_params(stages, shaping), locked.get("edited", {})
    stale = {stage: stale.get(stage, []) + edited.get(stage, []) for stage in stages if stage in stale | edited}
    return Run(name, flat(shaping), found, stale, origin)


def stale_params(stages: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return, by stage of dvc.lock, the parameters whose values are not those that it was run with."""
    found = {}
    for stage, entry in stages.items():
        made_with = entry.get("params", {}).get("params.yaml", {})
        before, now = flat(made_with), flat({name: params[name] for name in made_with if name in params})
        found[stage] = [name for name in before | now if before.get(name) != now.get(name)]
    return {stage: names for stage, names in found.items() if names}


def flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of nested mappings by their keys, joined by dots."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        inner = {f"{key}.{name}": each for name, each in flat(value).items()} if isinstance(value, Mapping) else {}
        found |= inner or {key: value}
    return found


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Return the runs in their order, those that differ in their seed only together.

    A run whose numbers were made with other parameters than it shows is alone: its seed may be among them.
    """
    groups: list[Group] = []
    for run in runs:
        for at, group in enumerate(groups):
            seeds = [other.params.get("seed") for other in group.runs]
            if _is_alike(run, group.runs[0]) and run.params.get("seed") not in seeds:
                groups[at] = Group((*group.runs, run))
                break
        else:
            groups.append(Group((run,)))
    return groups


def _is_alike(run: Run, other: Run) -> bool:
    """Return whether two runs, of the same code and data, differ in their seed at most."""
    is_same = (run.choices, run.origin) == (other.choices, other.origin)
    return is_same and not run.stale and not other.stale


Row = tuple[str, list[list[str]]]
"""What it is about, and each group's cell, as lines."""


def choice_rows(groups: Sequence[Group]) -> list[Row]:
    """Return a row per parameter that is not the same in all groups."""
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.params)
    cells = {name: [group.chosen(name) for group in groups] for name in names}
    return [(name, [[cell] for cell in row]) for name, row in cells.items() if len(set(row)) > 1]


def number_rows(groups: Sequence[Group]) -> list[Row]:
    """Return a row per headline number: its value, and from the second group on, how far it lies from the first's."""
    rows = []
    for name, headline in HEADLINE.items():
        first = groups[0].by_seed(name)
        cells = []
        for group in groups:
            own = group.by_seed(name)
            cell = [with_interval(Sample(tuple(own.values())), headline.format)] if own else ["–"]
            if own and first and group is not groups[0]:
                cell += [change] if (change := difference(own, first, headline.format)) else []
            cells.append(cell)
        if any(cell != ["–"] for cell in cells):
            rows.append((headline.label, cells))
    return rows


def difference(own: Mapping[Any, float], first: Mapping[Any, float], spec: str) -> str:
    """Return how far the values of some seeds lie from the first group's, and in percent; nothing where they don't."""
    shared = [seed for seed in own if seed in first]
    if shared:
        base = Sample(tuple(first[seed] for seed in shared)).mean
        found = Sample(tuple(own[seed] - first[seed] for seed in shared))
    else:
        base, mean = (Sample(tuple(values.values())).mean for values in (first, own))
        found = Sample((mean - base,))
    percent = f" ({100 * found.mean / base:+.2f} %)" if base else ""
    return "" if set(found.values) == {0} else f"{with_interval(found, f'+{spec}')}{percent}"


def with_interval(sample: Sample, spec: str) -> str:
    """Return the mean, and its 95 % interval where the values differ."""
    half = f" ± {sample.half_interval:{spec.removeprefix('+')}}" if sample.half_interval else ""
    return f"{sample.mean:{spec}}{half}"


def terminal_table(groups: Sequence[Group], width: int = WIDTH) -> str:
    """Return the comparison as text of at most `width` columns: below each other the parts that don't fit abreast."""
    rows = table_rows(groups)
    label = max(len(name) for name, _ in rows)
    widest = max(len(line) for _, cells in rows for cell in cells for line in cell)
    column = max(1, min(widest, (width - label) // min(len(groups), 2) - 2))
    abreast = max(1, (width - label) // (column + 2) - 1)
    first, *others = groups
    parts = [[first, *others[at : at + abreast]] for at in range(0, len(others), abreast)] or [[first]]
    return "\n\n".join("\n".join(_lines(table_rows(part), label, column)) for part in parts)


def table_rows(groups: Sequence[Group]) -> list[Row]:
    """Return all rows, the names of the groups first."""
    return [("", [[group.name] for group in groups]), *choice_rows(groups), *number_rows(groups)]


def _lines(rows: Sequence[Row], label: int, column: int) -> Iterable[str]:
    """Yield the lines of a table whose columns have the given widths; longer texts go on in the next line."""
    for name, cells in rows:
        wrapped = [[piece for line in cell for piece in textwrap.wrap(line, column) or [""]] for cell in cells]
        for at in range(max(map(len, wrapped))):
            texts = [cell[at] if at < len(cell) else "" for cell in wrapped]
            yield "  ".join([f"{'' if at else name:<{label}}", *(f"{text:>{column}}" for text in texts)]).rstrip()


def markdown_table(groups: Sequence[Group]) -> str:
    """Return the comparison as a Markdown table."""
    rows = table_rows(groups)
    lines = [[escaped(name), *("<br>".join(map(escaped, cell)) for cell in cells)] for name, cells in rows]
    lines.insert(1, ["---", *["---:" for _ in groups]])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def stale_lines(runs: Iterable[Run]) -> list[str]:
    """Return a line for each run that shows other parameters than its numbers were made with."""
    return [
        f"{run.name}: shows other values than {', '.join(run.stale)} ran with (dvc.lock): "
        f"{', '.join(dict.fromkeys(name for names in run.stale.values() for name in names))}; dvc repro"
        for run in runs
        if run.stale
    ]


def origin_lines(runs: Sequence[Run]) -> list[str]:
    """Return a line for each run whose training was made from other code or data than the first run's."""
    first, *others = runs
    lines = []
    for run in others:
        paths = [path for path in {**first.origin, **run.origin} if first.origin.get(path) != run.origin.get(path)]
        shown = paths[:SHOWN_PATHS] + (["…"] if len(paths) > SHOWN_PATHS else [])
        if first.origin and run.origin and paths:
            lines.append(f"{run.name}: trained from other code or data than {first.name}: {', '.join(shown)}")
    return lines


def comparison(runs: Sequence[Run], markdown: bool = False) -> str:
    """Return runs side by side, as text for a terminal or as Markdown; the first is what the others are held against.

    Raises `UserError` where none of them has results.
    """
    groups = grouped(runs)
    if not number_rows(groups):
        raise UserError(f"{', '.join(run.name for run in runs)}: no headline numbers; run dvc repro, or name a run")
    notes = [] if choice_rows(groups) else ["No parameter differs."]
    notes += [*stale_lines(runs), *origin_lines(runs)]
    notes += [LEGEND] if any(len(group.runs) > 1 for group in groups) else []
    return "\n\n".join([markdown_table(groups) if markdown else terminal_table(groups), *notes])

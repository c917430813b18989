"""Overlays on params.yaml for one machine or one purpose: `python -m dsv3.presets list | flags NAME | apply NAME`.

A preset states only what it changes. `flags` prints that as arguments for one experiment. Values of one's own
stand here too, where they win over the preset's:

    python -m dsv3.presets flags tiny -S train.max_steps=10 | xargs -r dvc exp run --temp

Behind `dvc exp run` an -S would lose: xargs puts the preset's after it, and DVC takes the last. (Between `$(` and `)` a
misspelt name would leave no flags, and start the default.)

`apply` writes it into params.yaml, whose comments stay.
"""

import shlex
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from dsv3.artifacts import write_text
from dsv3.cli import ParamsOption, run_app
from dsv3.errors import UserError, one_line
from dsv3.params.read import read_yaml, validated

FOLDER = Path(__file__).resolve().parents[1] / "presets"

Overlay = dict[str, Any]
"""Values by `section.key`."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="List the presets, print one as flags of `dvc exp run`, or write one into params.yaml.",
)
PresetArgument = Annotated[str, typer.Argument(help="A name that `list` prints.")]
OwnOption = Annotated[
    list[str] | None, typer.Option("-S", metavar="SECTION.KEY=VALUE", help="A value that wins over the preset's.")
]


def preset_names() -> list[str]:
    """Return the names of all presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_preset(name: str) -> Overlay:
    """Return what the preset changes; raise `UserError` where there is none of that name."""
    if name not in preset_names():
        raise UserError(f"{name} is no preset; known: {', '.join(preset_names())}")
    path = FOLDER / f"{name}.yaml"
    stated = read_yaml(path)
    if not isinstance(stated, dict) or not all(isinstance(values, dict) and values for values in stated.values()):
        raise UserError(f"{path}: is no preset; must hold sections of params.yaml with their keys")
    for section, values in stated.items():
        for key, value in values.items():
            if isinstance(value, dict | list):
                raise UserError(f"{path}: {section}.{key} is {value!s:.60}; must be one value")
    sections = round_trip().load(path.read_text(encoding="utf-8"))  # numbers remember how they are written
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def purpose(name: str) -> str:
    """Return the first sentence of the comment at the top of the preset."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8", errors="replace")
    return one_line(text.partition("\n")[0]).removeprefix("# ")


def flags(overlay: Overlay) -> list[str]:
    """Return the overlay as arguments of `dvc exp run`: -S section.key=value."""
    pairs = [f"{name}={_override(value)}" for name, value in overlay.items()]
    return [argument for pair in pairs for argument in ("-S", pair)]


def _override(value: Any) -> str:
    """Return a scalar as the grammar of `-S` writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def own_values(pairs: list[str], params: Path) -> Overlay:
    """Return texts like `train.max_steps=10` as an overlay; raise `UserError` for one that names no parameter."""
    known = _sections(params)
    overlay = {}
    for pair in pairs:
        name, is_pair, value = pair.partition("=")
        section, _, key = name.partition(".")
        values = known.get(section)
        if not is_pair or not (key in values if isinstance(values, dict) else name in known):
            raise UserError(f"{pair} names no parameter; must be section.key=value, as in {params}")
        overlay[name] = value  # as it is written: DVC reads it
    return overlay


def merged(values: dict[str, Any], overlay: Overlay) -> dict[str, Any]:
    """Return `values`, changed in place, with the overlay's values in it."""
    for name, value in overlay.items():
        section, _, key = name.partition(".")
        if not isinstance(values.get(section), dict):
            raise UserError(
                f"params.yaml has no section {section}, for {name}; git checkout params.yaml brings it back"
            )
        values[section][key] = value
    return values


def _sections(params: Path) -> dict[str, Any]:
    """Return the values in the file `params`; raise `UserError` where they are no mapping."""
    values = read_yaml(params)
    if not isinstance(values, dict):
        raise UserError(f"{params}: is {values!s:.60}; must hold sections; git checkout {params} brings it back")
    return values


def apply_preset(overlay: Overlay, params: Path) -> None:
    """Write the overlay into the file `params`, whose comments and order stay; nothing if the result is not valid."""
    validated(merged(_sections(params), overlay), params)
    yaml = round_trip()
    commented = yaml.load(params.read_text(encoding="utf-8"))
    text = StringIO()
    yaml.dump(merged(commented, overlay), text)
    write_text(params, text.getvalue())


def round_trip() -> YAML:
    """Return a reader and writer of YAML that keeps comments, order, quotes and `null`."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096  # never break a line
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), _null)
    return yaml


def _null(representer: RoundTripRepresenter, _: None) -> ScalarNode:
    """Return `null` as params.yaml writes it; ruamel would leave the place empty."""
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


@app.command("list")
def list_presets() -> None:
    """Print the names of the presets and what each is for."""
    for name in preset_names():
        typer.echo(f"{name:14} {purpose(name)}")


@app.command("flags")
def print_flags(name: PresetArgument, own: OwnOption = None, params: ParamsOption = Path("params.yaml")) -> None:
    """Print the preset as flags: python -m dsv3.presets flags NAME [-S section.key=value] | xargs -r dvc exp run."""
    overlay = read_preset(name)
    typer.echo(shlex.join(flags(overlay | own_values(own, params) if own else overlay)))


@app.command("apply")
def apply_by_name(name: PresetArgument, params: ParamsOption = Path("params.yaml")) -> None:
    """Write the preset into params.yaml."""
    overlay = read_preset(name)
    apply_preset(overlay, params)
    typer.echo(f"{params}: {len(overlay)} values of {name} written; `git diff {params}` shows them")


if __name__ == "__main__":
    run_app(app)

"""A preset's parameters, on the committed params.yaml and models."""

from typing import Any

from dsv3.params.read import Params, read_yaml, validated
from dsv3.presets import merged, read_preset
from tests.committed import PROJECT


def preset_params(preset: str, overlay: dict[str, Any]) -> Params:
    """Return the parameters of a preset with values of one's own over it."""
    place = PROJECT / "params.yaml"
    values = merged(read_yaml(place), dict(read_preset(preset)) | overlay)
    values["model"]["config"] = str(PROJECT / values["model"]["config"])
    return validated(values, place)

"""The folder that is exported again in another form."""

from pathlib import Path

from dsv3.artifacts import read_json
from dsv3.errors import UserError
from dsv3.export.loading import check_model
from dsv3.export.weights import check_config_model_type, check_model_weights, read_model_config


def check_source(model: Path) -> None:
    """Raise `UserError` unless `model` holds exactly the weights of its config.json, whole and in full precision."""
    config = model / "config.json"
    if not config.is_file():
        raise UserError(f"{model}: holds no config.json; name a folder that the train stage wrote")
    check_config_model_type(config)
    if "quantization_config" in read_json(config):
        raise UserError(f"{config}: has a quantization_config; name the folder in full precision that was quantized")
    check_model(model)
    if not any(model.glob("*.safetensors")):
        raise UserError(f"{model}: holds no *.safetensors; name a folder that the train stage wrote")
    check_model_weights(model, read_model_config(model))

"""The folder that is exported again in another form."""

from pathlib import Path

from dsv3.artifacts import check_weights, read_json
from dsv3.errors import UserError
from mini_model.validation_deepseek import check_model_type


def check_config_model_type(config: Path) -> None:
    """Raise `UserError` where config.json is another architecture's."""
    try:
        check_model_type(read_json(config).get("model_type"))
    except ValueError as error:
        raise UserError(f"{config}: {error}") from None


def check_source(model: Path) -> None:
    """Raise `UserError` unless `model` holds whole safetensors in full precision and their config.json."""
    config = model / "config.json"
    if not config.is_file():
        raise UserError(f"{model}: holds no config.json; name a folder that the train stage wrote")
    check_config_model_type(config)
    if "quantization_config" in read_json(config):
        raise UserError(f"{config}: has a quantization_config; name the folder in full precision that was quantized")
    if not any(model.glob("*.safetensors")):
        raise UserError(f"{model}: holds no *.safetensors; name a folder that the train stage wrote")
    check_weights(model)

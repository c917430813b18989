"""The folder that is exported again in another form."""

from pathlib import Path

from dsv3.artifacts import read_json
from dsv3.errors import UserError
from dsv3.export.loading import check_model
from dsv3.export.weights import check_config_model_type, check_model_weights, read_model_config
from mini_model.validation_deepseek import VARIANTS, other_variants


def check_source(model: Path) -> None:
    """Raise `UserError` unless `model` holds exactly the weights of its config.json, whole and in full precision.

    Who reads the other forms has DeepSeek-V3's router only, and would give other logits for another: it is refused.
    """
    config = model / "config.json"
    if not config.is_file():
        raise UserError(f"{model}: holds no config.json; name a folder that the train stage wrote")
    check_config_model_type(config)
    if "quantization_config" in read_json(config):
        raise UserError(f"{config}: has a quantization_config; name the folder in full precision that was quantized")
    check_model(model)
    if not any(model.glob("*.safetensors")):
        raise UserError(f"{model}: holds no *.safetensors; name a folder that the train stage wrote")
    architecture = read_model_config(model)
    for name, value in other_variants(architecture).items():
        raise UserError(
            f"{config}: {name} is {value!r}; must be {VARIANTS[name][0]!r}: what reads this form computes no other "
            "router; load the folder itself with trust_remote_code=True"
        )
    check_model_weights(model, architecture)

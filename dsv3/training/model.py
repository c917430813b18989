"""From an architecture's file to an initialized model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.params.architecture import HARMLESS, read_architecture
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM

CPU, META = torch.device("cpu"), torch.device("meta")


def build_model(config_path: Path, seed: int, device: torch.device = CPU) -> DeepseekV3ForCausalLM:
    """Return a newly initialized fp32 model, on the CPU, so that a seed gives the same weights on every device.

    On the device `META` it has shapes and no numbers.
    """
    config = read_config(config_path)
    torch.manual_seed(seed)
    with device:
        return DeepseekV3ForCausalLM(config)


def model_of(config_path: Path, weights: Mapping[str, Tensor]) -> DeepseekV3ForCausalLM:
    """Return the model of these weights, without a copy, to be exported; it has no buffers to run with."""
    model = build_model(config_path, seed=0, device=META)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def read_config(path: Path) -> DeepseekV3Config:
    """Return the configuration of the model that is built from an architecture's file.

    It gets the checked fields alone. The others of published files (`HARMLESS`) would change something in transformers'
    base class, or break it: `dtype`, `qk_head_dim`, `output_attentions`.
    """
    fields = read_architecture(path).model_dump(exclude_unset=True, exclude=set(HARMLESS))
    try:
        return DeepseekV3Config(**fields)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None

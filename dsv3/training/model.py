"""From an architecture's file to an initialized model."""

from pathlib import Path

import torch

from dsv3.errors import UserError
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM


def build_model(config_path: Path, seed: int) -> DeepseekV3ForCausalLM:
    """Return a newly initialized fp32 model, on the CPU, so that a seed gives the same weights on every device."""
    try:
        config = DeepseekV3Config.from_json_file(config_path)
    except (OSError, ValueError) as error:
        raise UserError(f"{config_path}: {error}") from None
    torch.manual_seed(seed)
    return DeepseekV3ForCausalLM(config)

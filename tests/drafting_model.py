"""Micro models whose MTP modules agree with the trunk always, never, or sometimes."""

import torch

from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM
from tests.training_inputs import MICRO

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

DISTURBANCE = 0.05
"""Factor on the layers' outputs, at which some drafts are accepted and some are not."""


@torch.no_grad()
def drafting_model(agreement: str, num_modules: int = 1, **changes) -> DeepseekV3ForCausalLM:
    """Return a model whose trunk predicts from the last token alone, as its modules do.

    `always`: the modules predict the same. `never`: they predict the opposite, the least probable token. `sometimes`:
    the layers of trunk and modules contribute too, so that the predictions depend on the whole text.
    """
    torch.manual_seed(3)
    sizes = {**MICRO, "vocab_size": 257, "initializer_range": 0.2, "num_nextn_predict_layers": num_modules, **changes}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes)).eval()
    for layer in model.model.layers:
        for name, weight in layer.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                weight.mul_(DISTURBANCE if agreement == "sometimes" else 0.0)
    width = model.config.hidden_size
    for module in list(model.model.layers)[model.config.num_hidden_layers :]:
        # [the later token's embedding; the state before] -> the embedding, or its negative
        passed = -torch.eye(width) if agreement == "never" else torch.eye(width)
        state_weight = module.eh_proj.weight[:, width:] * (0.3 if agreement == "sometimes" else 0.0)
        module.eh_proj.weight.copy_(torch.cat([passed, state_weight], dim=1))
    return model

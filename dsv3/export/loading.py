"""Loading an exported model: its numbers and its words, never its code.

The class is this checkout's `mini_model`, whatever Python files lie beside the weights: a folder from elsewhere can't
run anything here. Where they differ from this checkout's, a line says so.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from dsv3.artifacts import REMEDY, read_json, sha256_file
from dsv3.data.tokenizer_files import TOKENIZER_FILE, has_another_tokenizer
from dsv3.errors import UserError
from dsv3.export.model_folder import CODE_FILES
from dsv3.export.weights import check_config_model_type, check_model_weights, read_model_config, short_line
from dsv3.kernels import cpu_attention
from mini_model import modeling_deepseek
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM

OWN_CODE = Path(modeling_deepseek.__file__).parent
OWN_CLASSES = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
"""What `auto_map` names in a model that was exported here."""


def check_model(folder: Path, tokens: Path | None = None) -> None:
    """Raise `UserError` unless `folder` holds the configuration of a DeepSeek-V3 without code of others.

    Where token data are named, the model's tokenizer must be theirs: ids of another one mean other words.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder}: holds no config.json; run dvc repro train")
    check_config_model_type(config)
    auto_map = read_json(config).get("auto_map", {})
    if not isinstance(auto_map, dict) or any(OWN_CLASSES.get(name) != value for name, value in auto_map.items()):
        raise UserError(
            f"{config}: auto_map is {str(auto_map)[:100]}; must name the classes of mini_model or none: code in a "
            "model's folder is not run; remove it from a model of this architecture"
        )
    read_model_config(folder)
    if tokens is not None and has_another_tokenizer(folder, tokens):
        raise UserError(f"{folder}: its {TOKENIZER_FILE} is not that of {tokens}; name its own token data by --tokens")


def other_code(folder: Path) -> list[str]:
    """Return the names of shipped code files that differ from this checkout's."""
    shipped = [name for name in CODE_FILES if (folder / name).is_file()]
    return [name for name in shipped if sha256_file(folder / name) != sha256_file(OWN_CODE / name)]


def load_model(folder: Path, device: torch.device) -> DeepseekV3ForCausalLM:
    """Return the model in `folder` on `device`, in evaluation mode.

    The weights have their stored dtype on a GPU, and fp32 on a CPU, because most CPUs are fast in fp32 only. There the
    model attends by `dsv3.kernels.cpu_attention`. Raises `UserError` where a weight is missing, left over, of another
    shape, not finite, or not as it was exported.
    """
    check_model(folder)
    check_model_weights(folder, read_model_config(folder))
    different = other_code(folder)
    if different:
        print(f"{folder}: {', '.join(different)} differs from mini_model, whose code is used")  # noqa: T201
    dtype = torch.float32 if device.type == "cpu" else "auto"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of what does not fit; the line below says it
    try:
        loaded: Any = DeepseekV3ForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: can't be loaded ({short_line(error)}); {REMEDY}") from None
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded
    faults = {kind: found for kind, found in info.items() if found}
    if faults:
        raise UserError(f"{folder}: {str(faults)[:200]}; {REMEDY}")
    if device.type == "cpu":
        model.set_attn_implementation(cpu_attention.register())
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `folder`, whose files `load_model` has compared; no code from the folder is run."""
    check_model(folder)
    config = read_model_config(folder)  # transformers, left to itself, knows no variant's
    try:
        return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a file that it can't read
        raise UserError(f"{folder}: no tokenizer can be read ({short_line(error)}); {REMEDY}") from None

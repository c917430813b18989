"""The exported model whose weights a training starts from, where `train.init_from` names one.

Weights alone are taken: schedule, optimizer and data are the new training's. The folder may be one that was exported
here or one that transformers' own DeepseekV3 wrote. It must hold exactly the weights of the architecture that is
trained, behind the tokenizer of the token data: ids of another one would mean other words. Its files' SHA-256 are part
of the training's fingerprint (`dsv3.training.fingerprint`), so a checkpoint is resumed with the weights it began with.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dsv3.artifacts import sha256_file, sha256_lines
from dsv3.data.files import exists, local_path
from dsv3.data.tokenizer_files import TOKENIZER_FILE, has_another_tokenizer
from dsv3.errors import UserError
from dsv3.export.loading import load_model
from dsv3.export.source import check_source
from dsv3.export.weights import FIELDS, INDEX, read_model_config, short_line, weight_files
from dsv3.params.train import TrainParams
from dsv3.training.model import read_config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM

MAY_DIFFER = frozenset(
    {
        *("bos_token_id", "eos_token_id", "pad_token_id"),  # the export writes those of the token data
        *("use_cache", "output_router_logits"),  # what is returned
        *("initializer_range", "attention_dropout"),  # of training
        "max_position_embeddings",  # a bound
        "num_key_value_heads",  # of other tools
    }
)
"""Fields of the configuration with which the weights compute the same."""
HUB_FILES = ("config.json", "*.safetensors", INDEX, TOKENIZER_FILE)


@dataclass(frozen=True)
class InitialWeights:
    """A model's folder that was found to fit the training."""

    name: str
    """As params.yaml states it."""

    folder: Path
    sha256: str
    """Of all files of weights."""

    def __str__(self) -> str:
        return f"{self.name}, SHA-256 {self.sha256}"

    def copy_into(self, model: DeepseekV3ForCausalLM) -> None:
        """Replace all weights of `model`, on the CPU, by those in the folder."""
        model.load_state_dict(load_model(self.folder, torch.device("cpu")).state_dict())


def read_initial_weights(name: str, config: Path, tokens: Path) -> InitialWeights:
    """Return the weights that `train.init_from` names, for the architecture in `config` and the token data `tokens`.

    Raises `UserError` in one line where they are missing, damaged, or of another architecture or tokenizer.
    """
    try:
        folder = fetch_model_folder(name)
        check_source(folder)
        check_same_architecture(folder, config)
        check_same_tokenizer(folder, tokens)
    except UserError as error:
        raise UserError(f"train.init_from is {name:.200}; {error}") from None
    return InitialWeights(name, folder, weights_sha256(folder))


def weights_sha256(folder: Path) -> str:
    """Return one SHA-256 of all files of weights in a model's folder."""
    return sha256_lines({file.name: sha256_file(file) for file in weight_files(folder)})


def fetch_model_folder(name: str) -> Path:
    """Download the Hub's model of the id `name`, unless a folder has that name; return the folder that holds the model.

    Raises `UserError` if there is neither.
    """
    folder = local_path(name)
    if exists(folder):
        return folder
    import httpx2  # what huggingface_hub's own errors derive from; only this case needs the two
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES), etag_timeout=10))
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise UserError(f"no such folder, and no such model can be read from the Hub ({short_line(error)})") from None


def check_same_architecture(folder: Path, config: Path) -> None:
    """Raise `UserError` where the model in `folder` computes otherwise than one of `config`."""
    stored, trained = read_model_config(folder), read_config(config)
    values = {name: (getattr(stored, name), getattr(trained, name)) for name in FIELDS if name not in MAY_DIFFER}
    different = [f"{name} {there} instead of {here}" for name, (there, here) in values.items() if there != here]
    if different:
        raise UserError(f"of another architecture than {config} ({', '.join(different)}); set model.config to its own")


def check_same_tokenizer(folder: Path, tokens: Path) -> None:
    """Raise `UserError` where `folder` has a tokenizer, and another one than the token data."""
    if has_another_tokenizer(folder, tokens):
        raise UserError(f"its {TOKENIZER_FILE} is not that of {tokens}; set tokenize.tokenizer to its folder")


def check_not_replaced(train: TrainParams, model: Path) -> None:
    """Raise `UserError` where a model that the training reads lies where it writes its own `model`."""
    named = {"init_from is": train.init_from, **{f"teachers[{n}] is": name for n, name in enumerate(train.teachers)}}
    for where, name in named.items():
        if name is not None and local_path(name).resolve() == model.resolve():
            raise UserError(
                f"train.{where} {name}; is this training's own output, which DVC removes before it starts: dvc "
                "checkout brings it back; copy it to another folder, and name that"
            )

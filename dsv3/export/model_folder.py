"""What an exported model's folder holds, so that nothing else is lost when it is replaced."""

from pathlib import Path

from dsv3.artifacts import Contents, check_replaceable

CODE_FILES = ("configuration_deepseek.py", "modeling_deepseek.py", "validation_deepseek.py")
WEIGHTS = "model*.safetensors"
OTHER_FILES = (
    *CODE_FILES,
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "README.md",
    "SHA256SUMS",
    "__pycache__",
)
"""Names of what is written besides weights and tokenizer, as glob patterns."""


def model_folder_contents(tokens: Path) -> Contents:
    """Return the names in the folder of a model that is exported with the tokenizer of the token data `tokens`."""
    tokenizer = ("*token*.json", "chat_template.jinja", *(path.name for path in (tokens / "tokenizer").glob("*")))
    return Contents(WEIGHTS, (*OTHER_FILES, *tokenizer))


def check_model_folder(output: Path, tokens: Path) -> None:
    """Raise `UserError` where `output` holds something else than an exported model."""
    check_replaceable(output, model_folder_contents(tokens))

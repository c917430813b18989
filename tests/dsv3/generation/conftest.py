import pytest
from transformers import PreTrainedTokenizerFast

from tests.training_inputs import write_tokens


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(folder, seed=0)
    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")

"""The score beside lm-eval's, which is what other people's tables hold."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dsv3.evaluation.sliding_window import PositionLoss, score_split
from dsv3.export.loading import load_model, load_tokenizer
from tests.committed import DEFAULTS
from tests.exported_model import write_exported
from tests.training_inputs import WORDS

huggingface = pytest.importorskip(
    "lm_eval.models.huggingface", reason="not among the dependencies: pip install lm-eval"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own

BLOCK = 16


def test_in_windows_that_do_not_overlap_lm_evals_rolling_loglikelihood_is_ours(tmp_path):
    write_exported(tmp_path)
    folder = tmp_path / "final_model"
    model, tokenizer = load_model(folder, torch.device("cpu")), load_tokenizer(folder)
    text = " ".join(WORDS * 7)
    scorer = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, max_length=BLOCK, batch_size=1, device="cpu")
    (theirs,) = scorer.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)

    ids = [scorer.prefix_token_id, *scorer.tok_encode(text)]
    assert len(ids) % BLOCK  # so that the last window is moved back, in both
    params = DEFAULTS.evaluate.model_copy(update={"block_size": BLOCK, "stride": BLOCK})
    ours = score_split(model, np.array(ids, dtype=np.uint32), params, PositionLoss.zeros(BLOCK))
    assert ours == pytest.approx(-theirs, rel=1e-6)

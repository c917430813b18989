"""The score beside lm-eval's, which is what other people's tables hold."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dsv3.evaluation.sliding_window import PositionLoss, score_split
from dsv3.export.loading import load_model, load_tokenizer
from tests.committed import DEFAULTS, ROOT
from tests.exported_model import write_exported
from tests.training_inputs import WORDS

huggingface = pytest.importorskip(
    "lm_eval.models.huggingface", reason="not among the dependencies: pip install lm-eval"
)
lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own

BLOCK = 16


def test_the_task_of_ones_own_texts_is_what_lm_eval_reads_of_its_file(tmp_path, monkeypatch):
    """Each file is one document, scored as a whole, in bits per byte."""
    texts = {"one.txt": "To be, or not to be.\n\nThat is the question.\n", "two.txt": "Who's there?\n"}
    (tmp_path / "my_texts").mkdir()
    for name, text in texts.items():
        (tmp_path / "my_texts" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    manager = lm_eval_tasks.TaskManager(include_path=str(ROOT / "configs/lm_eval"), include_defaults=False)
    task = manager.load_task_or_group("local_text")["local_text"]
    documents = list(task.test_docs())
    assert [task.doc_to_target(document) for document in documents] == list(texts.values())
    assert {task.doc_to_text(document) for document in documents} == {""}
    assert task.config.output_type == "loglikelihood_rolling"
    assert set(task.aggregation()) == {"bits_per_byte", "byte_perplexity"}


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

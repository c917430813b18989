"""Transformers' common tests of a model, over its own DeepSeek-V3 classes and over this project's.

Runs inside transformers' tests: `tests/oracle/transformers_suite.py` copies it there.
"""

import unittest
from typing import Any, ClassVar

import torch
from transformers import DeepseekV3Config as StockConfig
from transformers import DeepseekV3ForCausalLM as StockForCausalLM
from transformers import DeepseekV3Model as StockModel
from transformers.testing_utils import torch_device

from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM, DeepseekV3Model

from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_tensor_parallel_mixin import TensorParallelTesterMixin

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "pad_token_id": 0,
}
BATCH, TOKENS = 13, 7


class Inputs:
    """What the common tests ask of a model's own tester."""

    def __init__(self, parent: Any) -> None:
        self.parent, self.batch_size, self.seq_length, self.is_training = parent, BATCH, TOKENS, True
        self.causal_lm_class = parent.causal_lm_class
        vars(self).update(SIZES)

    def get_config(self) -> Any:
        """Return a small architecture."""
        return self.parent.config_class(**SIZES)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """Return a small architecture, and tokens with a mask."""
        token_ids = ids_tensor([BATCH, TOKENS], SIZES["vocab_size"])
        return self.get_config(), {
            "input_ids": token_ids,
            "attention_mask": torch.ones_like(token_ids).to(torch_device),
        }


class Common(ModelTesterMixin, TensorParallelTesterMixin):
    """The common tests; those of one class follow."""

    pipeline_model_mapping: ClassVar[dict[str, Any]] = {}
    all_generative_model_classes = ()
    model_split_percents = (0.5, 0.7, 0.8)

    def setUp(self) -> None:
        self.model_tester = Inputs(self)
        self.config_tester = ConfigTester(self, config_class=self.config_class, hidden_size=32)

    def test_config(self) -> None:
        """A configuration is saved, loaded and compared."""
        self.config_tester.run_common_tests()

    @unittest.skip("queries and values differ in width, as transformers' own test of the model says")
    def test_sdpa_can_dispatch_on_flash(self) -> None:
        """Is left out."""


class StockTest(Common, unittest.TestCase):
    """Transformers' own classes."""

    config_class, causal_lm_class = StockConfig, StockForCausalLM
    all_model_classes = (StockModel, StockForCausalLM)
    _torch_compile_train_cls = StockForCausalLM


class OursTest(Common, unittest.TestCase):
    """The classes that this project ships."""

    config_class, causal_lm_class = DeepseekV3Config, DeepseekV3ForCausalLM
    all_model_classes = (DeepseekV3Model, DeepseekV3ForCausalLM)
    _torch_compile_train_cls = DeepseekV3ForCausalLM

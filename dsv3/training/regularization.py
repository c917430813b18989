"""Noise, in training only, against learning a small text by heart.

A text that is read many times is memorized: the training loss goes on falling, the loss on other text turns. Weight
decay (`dsv3.training.optimizer`) bounds the weights. Noise makes every visit of a sequence another one:

- dropout (`train.hidden_dropout`) zeroes a share of what each attention and each feed-forward network adds to the
  residual stream, and scales the rest up, as GPT-2 does. The report has none; its text is read once.
- token replacement (`train.token_replacement`) exchanges a share of the input tokens for random ones. Targets stay, so
  the model learns not to rely on any single token of its context.

Both are functions of the seed and of the micro-batch's number in the run (dropout by torch's generator, which is seeded
for each), so a resumed training, or one of another number of processes, draws the same. The alternative to hooks on the
layers is a configuration's field that the shipped model reads; it would then ship what only trainings need. What we
give up: with hooks, stock transformers fine-tunes an exported model without dropout.

Letters: B sequences, S positions
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mini_model.modeling_deepseek import DeepseekV3DecoderLayer, DeepseekV3ForCausalLM

STREAM = 1
"""Beside the seed and a number, what makes these random numbers others than an epoch's order (`dsv3.data.batches`)."""


def drop_hidden(model: DeepseekV3ForCausalLM, probability: float) -> None:
    """Let every layer's attention and feed-forward network drop a share of their output's numbers in training."""

    def drop(module: nn.Module, inputs: Any, output: Any) -> Any:
        del inputs
        if isinstance(output, Tensor):
            return F.dropout(output, probability, module.training)
        return (F.dropout(output[0], probability, module.training), *output[1:])  # weights or routing stay

    for layer in model.modules():
        if isinstance(layer, DeepseekV3DecoderLayer):
            layer.self_attn.register_forward_hook(drop)
            layer.mlp.register_forward_hook(drop)


@dataclass(frozen=True)
class TokenReplacement:
    """Random tokens in the place of a share of the input's."""

    share: float
    vocab_size: int
    bos_token_id: int
    """Begins each document; neither replaced nor put in."""

    seed: int

    def of_micro_batch(self, number: int, tokens_BS: Tensor) -> Tensor:
        """Return the input tokens of the run's micro-batch of that number, some of them replaced.

        The random numbers are PCG64's, which are the same everywhere, by the seed and the micro-batch's number, which
        does not depend on how many processes there are.
        """
        if self.share == 0 or self.vocab_size < 2:
            return tokens_BS
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, number, STREAM]))
        chance, drawn = bits.random_raw(2 * tokens_BS.numel()).reshape(2, *tokens_BS.shape)
        is_replaced = (chance >> np.uint64(11)) * 2.0**-53 < self.share  # uniform in [0, 1), as NumPy makes it
        others = (drawn % np.uint64(self.vocab_size - 1)).astype(np.int64)
        others += others >= self.bos_token_id
        mask = torch.from_numpy(is_replaced).to(tokens_BS.device) & (tokens_BS != self.bos_token_id)
        return torch.where(mask, torch.from_numpy(others).to(tokens_BS.device), tokens_BS)

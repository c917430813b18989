"""An exponential moving average of the weights, which is validated and exported in their place.

Each step moves the weights along the gradient of a few sequences, so they wander around what all of the text would ask
for. Their average over the last steps lies closer to it: Polyak and Juditsky's averaging, with a memory of about
1 / (1 - β) steps (report, section 3.2.3, which keeps one to see early how a model would score after the decay):

    average <- β_t · average + (1 - β_t) · weights,    β_t = min(β, (1 + t) / (10 + t)),    β = train.ema_decay

after step t; β_t grows, for the first weights are no part of what is wanted. The gradients are taken at the weights
themselves, which know nothing of their average. The router's bias is no weight: it answers the last steps' load, and
stays.

The averages lie in the optimizer's state (`dsv3.training.optimizer`), beside the moments: a checkpoint holds them, a
sharded training has its part of each, and a resumed one goes on with the same bits. What we give up: one more fp32
number per parameter, and the time to read and write it. A decay of the learning rate to zero averages too; what is left
to gain is in docs/log.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule

from dsv3.training.optimizer import AVERAGE, Optimizer
from dsv3.training.sharding import local
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM


@contextmanager
def averaged_weights(model: DeepseekV3ForCausalLM, optimizer: Optimizer) -> Iterator[None]:
    """Let the model compute with the averages within the block; without averages, with its weights as ever."""
    exchange_with_averages(model, optimizer)
    try:
        yield
    finally:
        exchange_with_averages(model, optimizer)


@torch.no_grad()
def exchange_with_averages(model: DeepseekV3ForCausalLM, optimizer: Optimizer) -> None:
    """Put the averages in the weights' place, and the weights in theirs; twice, and all is as it was, to the bit."""
    for parameter, state in optimizer.state.items():
        if AVERAGE in state:
            weights, average = local(parameter), local(state[AVERAGE])
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # whole weights that a pass has left gathered are the others'

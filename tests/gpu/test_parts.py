"""The rest of the network on a device in bf16, against fp32 on the same device."""

import pytest
import torch

from dsv3.training.loss import chunked_cross_entropy
from dsv3.training.optimizer import Optimizer
from mini_model.configuration_deepseek import DeepseekV3Config
from mini_model.modeling_deepseek import (
    DeepseekV3Attention,
    DeepseekV3ForCausalLM,
    DeepseekV3RotaryEmbedding,
    cross_entropy,
)
from tests.committed import DEFAULTS
from tests.dsv3.kernels.cases import errors
from tests.training_inputs import MICRO

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

BF16 = 2e-2
"""Relative error by the norm: each rounding to bf16 errs by 2^-9 at most; a handful follow each other."""
ATTENTION = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 256} | {
    "kv_lora_rank": 256, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128
}  # fmt: skip
"""The dimensions of DeepSeek's heads: queries and keys of 192, values of 128."""


def autocast(device: torch.device, enabled: bool):
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def test_chunked_cross_entropy_in_bf16_gives_the_loss_and_gradients_of_the_plain_form_in_fp32(device, is_small):
    num_tokens, width, vocab_size = (64, 32, 300) if is_small else (4096, 512, 32_000)
    hidden = torch.randn(num_tokens, width, device=device).requires_grad_()
    head = (torch.randn(vocab_size, width, device=device) * width**-0.5).requires_grad_()
    labels = torch.randint(0, vocab_size, (num_tokens,), device=device)
    labels[::7] = -100
    outcomes = []
    for function, is_bf16 in ((cross_entropy, False), (chunked_cross_entropy, True)):
        with autocast(device, is_bf16):
            loss = function(hidden, head, labels)
        by_hidden, by_head = torch.autograd.grad(loss * 0.7, (hidden, head))
        outcomes.append({"loss": loss.detach(), "hidden": by_hidden, "head": by_head})
    found = errors(outcomes[1], outcomes[0])
    assert found.pop("loss") < 1e-3  # a mean over many tokens
    assert max(found.values()) < BF16, found


def attention_on(device: torch.device, implementation: str) -> tuple[DeepseekV3Attention, DeepseekV3RotaryEmbedding]:
    torch.manual_seed(0)
    config = DeepseekV3Config(**MICRO | ATTENTION | {"max_position_embeddings": 1024})
    config._attn_implementation = implementation
    attention = DeepseekV3Attention(config, layer_idx=0).train()
    for parameter in attention.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return attention.to(device), DeepseekV3RotaryEmbedding(config).to(device)


def test_attention_in_bf16_gives_the_readable_forms_output_and_gradients_in_fp32(device, is_small):
    """sdpa's kernel against `eager_attention`, with queries wider than values, over more than one block of keys."""
    length = 16 if is_small else 640
    hidden, grad = torch.randn(2, 2, length, ATTENTION["hidden_size"], device=device)
    outcomes = []
    for implementation, is_bf16 in (("eager", False), ("sdpa", True)):
        attention, rotary = attention_on(device, implementation)
        x = hidden.clone().requires_grad_()
        angles = rotary(x, torch.arange(length, device=device)[None])
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
        with autocast(device, is_bf16):
            output, _ = attention(x, angles, causal if implementation == "eager" else None)
        output.backward(grad.to(output.dtype))
        gradients = {name: parameter.grad for name, parameter in attention.named_parameters()}
        outcomes.append({"output": output.detach(), "input": x.grad, **gradients})
    found = errors(outcomes[1], outcomes[0])
    assert max(found.values()) < BF16, found


@torch.no_grad()
def test_decoding_on_the_latent_cache_in_bf16_gives_the_logits_of_reading_all_at_once_in_fp32(device, is_small):
    torch.manual_seed(0)
    config = DeepseekV3Config(**MICRO | ATTENTION | {"hidden_size": 256})
    model = DeepseekV3ForCausalLM(config).eval().to(device)
    ids = torch.randint(0, MICRO["vocab_size"], (2, 8 if is_small else 48), device=device)
    expected = model(ids, use_cache=False).logits
    cache, logits = None, []
    with autocast(device, True):
        for position in range(ids.shape[1]):
            out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    found = errors({"logits": torch.cat(logits, dim=1)}, {"logits": expected})
    assert found["logits"] < BF16, found


def test_adamw_with_bf16_moments_follows_the_arithmetic_of_a_cpu(device, is_small):
    """Two steps: the second one reads moments that the first one rounded."""
    shape = (64, 48) if is_small else (2048, 1024)
    params = DEFAULTS.train.model_copy(update={"adam_moments_dtype": "bf16", "optim": "adamw"})
    start, gradients = torch.randn(shape), [torch.randn(shape) * 1e-3 for _ in range(2)]
    outcomes = []
    for place in ("cpu", device):
        weight = start.clone().to(place).requires_grad_()
        group = {"name": "adamw", "params": [weight], "weight_decay": params.weight_decay}
        optimizer = Optimizer([group], params, torch.float32)
        for gradient in gradients:
            weight.grad = gradient.to(place)
            optimizer.step()
        state = optimizer.state[weight]
        assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
        moments = {name: state[name].float().cpu() for name in ("exp_avg", "exp_avg_sq")}
        outcomes.append({"change": (weight.detach().cpu() - start) / params.learning_rate, **moments})
    # A moment on the border between two bf16 numbers may round either way: 2^-9 of it, for some of them.
    found = errors(outcomes[1], outcomes[0])
    assert max(found.values()) < 1e-3, found

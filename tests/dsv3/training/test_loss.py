import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3.sizing.chunked_loss import is_loss_chunked
from dsv3.training import loss
from dsv3.training.loss import chunked_cross_entropy
from mini_model.modeling_deepseek import cross_entropy

# Sums over up to 300 words in another order; fp32 keeps 24 bits.
RTOL, ATOL = 1e-5, 1e-6


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.num_bytes = max(self.num_bytes, leaf.untyped_storage().nbytes())
        return result


def inputs(num_tokens: int, width: int, vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, width, generator=generator)
    head = torch.randn(vocab_size, width, generator=generator) * 0.3
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(), labels


def loss_and_gradients(function, hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = function(hidden, head, labels)
    # An upstream derivative other than 1, as accumulation and lambda give it.
    return value.detach(), *torch.autograd.grad(value * 0.7, (hidden, head))


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    vocab_size=st.integers(2, 300),
    chunk_tokens=st.integers(1, 50),
    num_ignored=st.integers(0, 40),
)
def test_loss_and_gradients_equal_the_plain_forms_whatever_the_chunks(
    num_tokens, vocab_size, chunk_tokens, num_ignored
):
    hidden, head, labels = inputs(num_tokens, 8, vocab_size)
    labels[: min(num_ignored, num_tokens - 1)] = -100
    expected = loss_and_gradients(cross_entropy, hidden, head, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss.CHUNK_BYTES, "cpu", 4 * vocab_size * chunk_tokens)
        actual = loss_and_gradients(chunked_cross_entropy, hidden, head, labels)
    for ours, plain in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=RTOL, atol=ATOL)


def test_ignored_labels_alone_give_no_loss_and_no_gradient():
    hidden, head, labels = inputs(5, 4, 7)
    value, by_hidden, by_head = loss_and_gradients(chunked_cross_entropy, hidden, head, labels.fill_(-100))
    assert value == 0
    assert by_hidden.abs().max() == 0
    assert by_head.abs().max() == 0


def test_the_logits_never_exist_at_once(monkeypatch):
    num_tokens, vocab_size = 512, 8192
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 1 << 20)
    hidden, head, labels = inputs(num_tokens, 16, vocab_size)
    full_bytes = 4 * num_tokens * vocab_size
    with LargestTensor() as plain:
        loss_and_gradients(cross_entropy, hidden, head, labels)
    with LargestTensor() as chunked:
        loss_and_gradients(chunked_cross_entropy, hidden, head, labels)
    assert plain.num_bytes == full_bytes
    assert chunked.num_bytes <= full_bytes / 16


def test_under_autocast_the_products_are_bf16_and_the_heads_gradient_is_summed_in_fp32(monkeypatch):
    hidden, head, labels = inputs(64, 32, 100)
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 4 * 100 * 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_and_gradients(cross_entropy, hidden, head, labels)
        actual = loss_and_gradients(chunked_cross_entropy, hidden, head, labels)
    assert [tensor.dtype for tensor in actual] == [torch.float32] * 3
    for ours, plain in zip(actual, expected, strict=True):
        # bf16 keeps 8 bits; both round the same logits, their derivatives at different moments.
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=1e-3)


def test_no_gradient_is_computed_for_what_does_not_ask_for_one():
    hidden, head, labels = inputs(5, 4, 7)
    value = chunked_cross_entropy(hidden.detach(), head, labels)
    value.backward()
    assert hidden.grad is None
    assert head.grad is not None


def test_chunks_pay_for_a_large_vocabulary_and_not_for_nanos():
    assert is_loss_chunked(num_tokens=4096, vocab_size=129_280)
    assert not is_loss_chunked(num_tokens=4096, vocab_size=1024)

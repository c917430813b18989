"""When the loss is computed in chunks of logits, and how large they are; training and its estimate share this."""

CHUNK_BYTES = 64 << 20
"""Largest block of fp32 logits that exists at once: large enough to keep a GPU busy, small beside any layer."""

MIN_LOGITS_BYTES = 256 << 20
"""Below this the plain form is as good: its logits fit, and one large product beats several small ones."""


def is_loss_chunked(num_tokens: int, vocab_size: int) -> bool:
    """Return whether the full fp32 logits would take more than `MIN_LOGITS_BYTES`."""
    return num_tokens * vocab_size * 4 > MIN_LOGITS_BYTES

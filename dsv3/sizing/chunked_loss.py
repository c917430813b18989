"""When the loss is computed in chunks of logits, and how large they are; training and its estimate share this."""

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Largest block of fp32 logits that exists at once, small beside a model. Each chunk passes once over the fp32 gradient
of the head, 1 GB for a vocabulary of 129,280, which is what a GPU would spend its time on with small ones."""

MIN_LOGITS_BYTES = 256 << 20
"""Below this the plain form is as good: its logits fit, and one large product beats several small ones."""


def is_loss_chunked(num_tokens: int, vocab_size: int) -> bool:
    """Return whether the full fp32 logits would take more than `MIN_LOGITS_BYTES`."""
    return num_tokens * vocab_size * 4 > MIN_LOGITS_BYTES

"""The optimizers by name: what each keeps and computes for the matrices that `train.optim` updates.

Whatever `train.optim` is, AdamW updates the rest: embedding, head, routers and vectors. Nothing here imports torch, so
`train.optim` is validated, and a training's memory estimated, in the first second. `dsv3.training.optimizer` adds the
update of each.
"""

from dataclasses import dataclass

MAX_BATCH_NUMBERS = 1 << 26
"""Most numbers that Muon orthogonalizes in one call: 256 MiB in fp32, so large models need little extra memory."""


@dataclass(frozen=True)
class MatrixOptimizer:
    """What the estimate of memory must know of an optimizer; copies are in the type of its matrix products."""

    moments: int
    """Moments per number, in `adam_moments_dtype`."""
    widened_copies: int = 0
    """fp32 copies of one parameter, where the moments are bf16."""
    update_copies: int = 0
    """Copies of the updates of all matrices, which exist at once."""
    batch_copies: int = 0
    """Copies of one batch of matrices, of up to `MAX_BATCH_NUMBERS`."""
    gram_copies: int = 0
    """Products of that batch's matrices with their own transposes."""


OPTIMIZERS = {
    # Fused: nothing is copied, but with bf16 moments both of them.
    "adamw": MatrixOptimizer(moments=2, widened_copies=2),
    # Batch: concatenated, normalized, next iterate. Gram: the matrix, its square, their sum.
    "muon": MatrixOptimizer(moments=1, update_copies=1, batch_copies=3, gram_copies=3),
}

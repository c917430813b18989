"""Learning from other models' predictions beside the text's tokens (Hinton et al., 2015, arXiv:1503.02531).

The text names one next token per position. A trained model, a teacher, says of every token how probable it is there,
which holds more of the language than one draw from it. Several teachers' mean is better than each; one student that
learns from it keeps most of what they gain together, at the cost of one model when it is used. The loss is

    (1 - w) · CE(text) + w · CE(a teacher's probabilities),    w = train.distillation_weight

where micro-batch n of the run is teacher n mod K's. Cross-entropy is linear in the probabilities, so the K teachers in
turn ask for what their mean asks for, and a micro-batch costs one teacher's forward pass instead of K: more teachers
cost memory, and no time. What we give up: a little more noise from one micro-batch to the next.

It is so for every head: an MTP module of depth k predicts token i + k + 1 at position i, of which the teachers speak at
i + k. Teachers read the text's own tokens, whatever noise the student reads (`dsv3.training.regularization`), in
evaluation mode, and learn nothing.

Two more things would cost less. The probabilities could be computed once and read in every epoch; an epoch's blocks
begin elsewhere each time (`dsv3.data.batches`), so other contexts would be meant. A few most probable tokens could
stand for all; with a small vocabulary that saves little. What else we give up: logits and probabilities of a
micro-batch exist whole (T x V numbers), and each process holds every teacher.

Letters: B sequences, S positions, T tokens, D hidden_size, V vocab_size
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3.errors import UserError
from dsv3.export.loading import load_model
from dsv3.export.source import check_source
from dsv3.export.weights import read_model_config
from dsv3.training.initial_weights import InitialWeights, check_same_tokenizer, fetch_model_folder, weights_sha256
from mini_model.modeling_deepseek import IGNORED_LABEL, DeepseekV3ForCausalLM

CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]


def read_teacher(name: str, vocab_size: int, block_size: int, tokens: Path) -> InitialWeights:
    """Return the model that `train.teachers` names, for token data `tokens` and an architecture of that vocabulary.

    Raises `UserError` in one line where it is missing, damaged, of another vocabulary or tokenizer, or made for shorter
    sequences.
    """
    try:
        folder = fetch_model_folder(name)
        check_source(folder)
        config = read_model_config(folder)
        if config.vocab_size != vocab_size:
            raise UserError(f"its vocab_size is {config.vocab_size}; must be {vocab_size}, the model's")
        if (longest := config.max_position_embeddings) < block_size:
            raise UserError(f"its max_position_embeddings is {longest}; must be >= {block_size}, train.block_size")
        check_same_tokenizer(folder, tokens)
    except UserError as error:
        raise UserError(f"train.teachers names {name:.200}; {error}") from None
    return InitialWeights(name, folder, weights_sha256(folder))


@dataclass
class Distillation:
    """The teachers of a training, and the loss that stands in the place of `model.cross_entropy`."""

    teachers: Sequence[DeepseekV3ForCausalLM]
    weight: float
    """w: the teachers' share of the loss."""

    plain: CrossEntropy
    """The loss of the text alone, as validation takes it."""

    probabilities_BSV: Tensor | None = None
    text_losses: list[Tensor] = field(default_factory=list)
    """The text's own losses in the latest micro-batch: of the main head, and of each MTP module's."""

    @classmethod
    def of(cls, folders: Sequence[Path], weight: float, plain: CrossEntropy, device: torch.device) -> "Distillation":
        """Load the teachers, fp32, onto `device`."""
        return cls([load_model(folder, device).float().requires_grad_(False) for folder in folders], weight, plain)

    @contextmanager
    def teaching(self, probabilities_BSV: Tensor) -> Iterator[None]:
        """Let the losses within the block, of one micro-batch, be those of the text and of these probabilities."""
        self.probabilities_BSV, self.text_losses = probabilities_BSV, []
        try:
            yield
        finally:
            self.probabilities_BSV = None

    @torch.no_grad()
    def probabilities(self, number: int, tokens_BS: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return each token's probability at each position by the teacher of the run's micro-batch of that number.

        (B, S, V), fp32. The number does not depend on how many processes there are, or where a training was resumed.
        """
        teacher = self.teachers[number % len(self.teachers)]
        logits = teacher(input_ids=tokens_BS, position_ids=position_ids, use_cache=False).logits
        return logits.softmax(dim=-1, dtype=torch.float32)

    def cross_entropy(self, hidden_TD: Tensor, head_weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        """Return the mean loss of the labels that are not -100; outside of `teaching` the text's alone."""
        if self.probabilities_BSV is None:
            return self.plain(hidden_TD, head_weight_VD, labels_T)
        depth = self.probabilities_BSV.shape[1] - len(labels_T) // len(self.probabilities_BSV)
        taught_TV = self.probabilities_BSV[:, depth:].flatten(0, 1)
        log_TV = F.linear(hidden_TD, head_weight_VD).float().log_softmax(dim=-1)
        kept_T = labels_T != IGNORED_LABEL
        count = kept_T.sum().clamp(min=1)
        text = F.nll_loss(log_TV, labels_T, ignore_index=IGNORED_LABEL, reduction="sum") / count
        taught = -((taught_TV * log_TV).sum(dim=-1) * kept_T).sum() / count
        self.text_losses.append(text.detach())
        return torch.lerp(text, taught, self.weight)

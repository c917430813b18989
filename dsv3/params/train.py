"""Section `train`: parameters of the stage of that name."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from dsv3.params.expert_backends import BACKENDS
from dsv3.params.optimizers import OPTIMIZERS
from dsv3.params.section import OneOf, Section, usable_name
from mini_model.validation_deepseek import SMALLEST_NORMAL_FP32


class TrainParams(Section):
    """Section `train`: everything that shapes the weights."""

    num_train_epochs: float = Field(gt=0, le=1e6)
    """Passes over the training tokens; ignored when max_steps is positive."""

    max_steps: int = Field(le=10**9)
    """Optimizer steps; -1: as many as num_train_epochs asks for. At a thousand a second, the most take eleven days."""

    per_device_train_batch_size: int = Field(ge=1)
    """Sequences in one forward pass."""

    gradient_accumulation_steps: int = Field(ge=1)
    """Forward passes per optimizer step, over all processes together: their number never changes the batch."""

    batch_ramp_levels: int = Field(ge=1)
    """Equal steps in which the batch grows to its full size (report: from a fifth, 5); 1: full from the start."""

    batch_ramp_ratio: float = Field(ge=0, lt=1)
    """Share of the training tokens after which the batch has its full size (report: 0.032)."""

    per_device_eval_batch_size: int = Field(ge=1)
    """Sequences in one forward pass of validation."""

    block_size: int = Field(ge=8)
    """Tokens in one training sequence."""

    cross_document_attention: bool
    """True: documents packed into one sequence see the ones before (as in the report); false: each sees itself only."""

    optim: Annotated[str, OneOf(OPTIMIZERS)]
    """Optimizer of matrices and expert stacks; embeddings, head, routers and vectors are always updated by AdamW."""

    learning_rate: float = Field(ge=1e-10, le=1)
    """Peak learning rate; Muon's update is scaled to AdamW's RMS, so that one rate serves both. An update has an RMS of
    about 1 before it: a rate of 1 moves a weight further in one step than any trained one lies from zero, and below
    1e-10 a weight of 0.01 stays where it is, for fp32 numbers there lie 1e-9 apart."""

    weight_decay: float = Field(ge=0)
    """Decoupled weight decay of matrices; norms, biases and embeddings are not decayed. A step shrinks weights by
    learning_rate times this, which must be less than 1."""

    hidden_dropout: float = Field(ge=0, lt=1)
    """Probability with which a number of what attention and feed-forward networks add to the residual stream is zero in
    training. (Of attention weights: attention_dropout in the architecture's file.)"""

    token_replacement: float = Field(ge=0, lt=1)
    """Share of the input tokens that are random ones of the vocabulary in training; targets stay as they are."""

    adam_beta1: float = Field(ge=0, lt=1)
    """Decay of AdamW's first moment."""

    adam_beta2: float = Field(ge=0, lt=1)
    """Decay of AdamW's second moment."""

    adam_epsilon: float = Field(ge=SMALLEST_NORMAL_FP32, le=1)
    """AdamW's epsilon. A smaller one is zero in fp32: a weight without gradients would become 0 / 0."""

    adam_moments_dtype: Literal["fp32", "bf16"]
    """bf16 halves the optimizer's memory, as in the report (section 3.3.3)."""

    muon_momentum: float = Field(ge=0, lt=1)
    """Nesterov momentum of Muon."""

    ema_decay: float = Field(ge=0, le=1 - 1e-6)
    """beta: how much of the moving average of the weights a step keeps; the average is validated and exported. 0: none.
    fp32 holds a millionth of a weight and little less, so it can't be nearer to 1."""

    max_grad_norm: float = Field(ge=1e-6)
    """Largest gradient norm; larger gradients are scaled down to it. Much less would vanish beside AdamW's epsilon."""

    lr_scheduler_type: Literal["deepseek_v3", "cosine", "linear", "constant"]
    """deepseek_v3: warm-up, constant, cosine, two constant tails, as fractions of the budget."""

    warmup_ratio: float = Field(ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly from zero."""

    min_lr_ratio: float = Field(ge=0, le=1)
    """Learning rate at the end of the decay, as a share of the peak (cosine, linear)."""

    bias_update_rate: float = Field(ge=0, le=1)
    """gamma: step of the router's bias per optimizer step; 0 turns loss-free balancing off. Affinities lie between 0
    and 1, so a step of 1 outvotes every one."""

    bias_freeze_ratio: float = Field(ge=0, le=1)
    """Last share of the steps in which gamma is 0 (report: 0.034)."""

    sequence_loss_weight: float = Field(ge=0, le=10)
    """alpha: weight of the sequence-wise balance loss (report: 1e-4), which is about 1; at 10 it outweighs the text."""

    mtp_loss_weight: float = Field(ge=0, le=10)
    """lambda: weight of the multi-token prediction loss for the first 67.6 % of the steps."""

    mtp_loss_weight_final: float = Field(ge=0, le=10)
    """lambda for the rest of the steps."""

    eval_steps: int = Field(ge=1)
    """Optimizer steps between two validations, which decide which weights are the best; with use_fp8 also between two
    measurements of what FP8 does to the numbers."""

    load_best_model_at_end: bool
    """Export the weights with the lowest validation loss instead of the last ones."""

    precision: Literal["auto", "fp32", "bf16"]
    """auto: bf16 on a GPU that multiplies it natively, else fp32."""

    use_fp8: bool
    """Block-scaled FP8 on top of `precision`."""

    fp8_weight_quant: bool
    """Quantize weights in 128x128 blocks (with use_fp8)."""

    fp8_activation_quant: bool
    """Quantize activations and their gradients in 1x128 tiles (with use_fp8)."""

    fp8_power_of_two_scales: bool
    """Round the scales of all blocks up to powers of two (with use_fp8): exact to multiply by, up to a bit coarser."""

    fp8_mx_blocks: bool
    """MXFP8, Blackwell's format, instead of DeepSeek's blocks (with use_fp8): all operands in blocks of 32 along the
    inner dimension, with power-of-two scales; emulated on every device."""

    fp8_wgrad_quant: bool
    """Quantize the weight gradient's operands too (with use_fp8); false: bf16 on a GPU, unrounded in an emulation."""

    fp8_swiglu_cache: bool
    """Keep the input of the routed experts' SwiGLU in FP8 until the backward pass (report, section 3.3.3)."""

    experts: Annotated[str, OneOf(["auto", *BACKENDS])]
    """Backend of the expert computation; auto chooses by device and precision, and is recorded."""

    init_from: str | None
    """An exported model, a folder or Hub id, whose weights the training starts from instead of new ones: weights alone,
    of the same architecture and tokenizer. A change of them is another training to checkpoints; DVC does not see it
    (dvc repro -f train). null: new weights."""

    teachers: list[Annotated[str, Field(min_length=1), AfterValidator(usable_name)]]
    """Exported models, folders or Hub ids, from whose predictions, in turn, the training learns too (distillation): of
    the same vocabulary and tokenizer, of any size. As with init_from, DVC does not see that their files change."""

    distillation_weight: float = Field(ge=0, le=1)
    """With teachers: their share of the loss, the text's own being the rest."""

    resume_from_checkpoint: str | None
    """A checkpoint's folder (step_N) to go on from, of the same architecture, whatever its precision; null: none.
    Schedules are those of the new training from there on: where it is longer, the learning rate is that of its own step
    and may rise again."""

    gradient_checkpointing: bool
    """Recompute each layer in the backward pass instead of keeping its activations."""

    torch_compile: bool
    """Compile the model with torch.compile."""

    @model_validator(mode="after")
    def fits_together(self) -> Self:
        """Check the relations within the section."""
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps is {self.max_steps}; must be positive, or -1 to train num_train_epochs")
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay is {self.weight_decay:g}; must be < {1 / self.learning_rate:g}, 1 / learning_rate, "
                "or a step shrinks weights past zero"
            )
        if self.init_from is not None and self.resume_from_checkpoint is not None:
            raise ValueError(
                "init_from must be null beside resume_from_checkpoint, whose weights would replace its own"
            )
        if self.teachers and self.torch_compile:
            raise ValueError("torch_compile is true; must be false with teachers, which speak between two graphs")
        if self.warmup_ratio + self.bias_freeze_ratio > 1:
            raise ValueError("warmup_ratio + bias_freeze_ratio exceeds 1; together they are shares of the same steps")
        if self.gradient_accumulation_steps % self.batch_ramp_levels:
            raise ValueError(
                f"batch_ramp_levels is {self.batch_ramp_levels}; must divide gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}), the forward passes of a whole batch"
            )
        return self

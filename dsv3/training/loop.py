"""The training loop: everything that is learning, and nothing else.

Validation, checkpoints, curves and the progress bar are hooks: plain functions of the run and of what the step
measured, called every so many steps. Resuming needs only the step, for data, schedules and random numbers are functions
of it.

Letters: B sequences, S positions, L layers, E n_routed_experts.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv3.data.batches import StepLayout, document_positions, micro_batches
from dsv3.errors import Interrupted, UserError
from dsv3.kernels.weight_cache import cached_weights
from dsv3.training.balancing import pop_expert_load, update_router_bias
from dsv3.training.distillation import Distillation
from dsv3.training.interruption import Interruption
from dsv3.training.optimizer import Optimizer
from dsv3.training.plan import TrainingPlan
from dsv3.training.regularization import TokenReplacement
from dsv3.training.schedule import bias_update_rate, ema_decay, learning_rate, mtp_loss_weight
from dsv3.training.state import LOSS_PARTS, Measured, TrainState
from mini_model.modeling_deepseek import DeepseekV3CausalLMOutput, DeepseekV3ForCausalLM


@dataclass
class Run:
    """A training that is ready to go on from `state.step`."""

    plan: TrainingPlan
    accelerator: Accelerator
    layout: StepLayout
    model: DeepseekV3ForCausalLM
    """The model itself, for its weights and routers."""

    forward: Callable[..., DeepseekV3CausalLMOutput]
    """The model as it is called: wrapped for autocast, compilation and several processes."""

    optimizer: Optimizer
    state: TrainState
    interruption: Interruption
    distillation: Distillation | None = None
    """The teachers, where there are any."""

    def micro_batches(self) -> Generator[Tensor]:
        """Return this process's batches from the next step on."""
        runtime, steps = self.plan.params.runtime, range(self.state.step, self.plan.total_steps)
        workers, pin_memory = runtime.dataloader_num_workers, runtime.dataloader_pin_memory
        return micro_batches(self.plan.batches, self.layout, steps, workers, pin_memory)

    def input_ids(self, number: int, tokens_BS: Tensor) -> Tensor:
        """Return what the model reads of the run's micro-batch of that number: some tokens are random, where asked."""
        share, meta = self.plan.params.train.token_replacement, self.plan.meta
        replacement = TokenReplacement(share, meta["vocab_size"], meta["bos_token_id"], self.plan.params.seed)
        return replacement.of_micro_batch(number, tokens_BS)

    def teaching(self, number: int, tokens_BS: Tensor) -> AbstractContextManager[None]:
        """Return the block in which losses are by a teacher too, of the run's micro-batch of that number and tokens."""
        if self.distillation is None:
            return nullcontext()
        with self.accelerator.autocast():
            probabilities = self.distillation.probabilities(number, tokens_BS, self.position_ids(tokens_BS))
        return self.distillation.teaching(probabilities)

    def position_ids(self, tokens_BS: Tensor) -> Tensor | None:
        """Return positions that restart with each document, where documents are not to see one another; else None."""
        if self.plan.params.train.cross_document_attention:
            return None
        return document_positions(tokens_BS, self.plan.meta["bos_token_id"])

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` where they exceed it; return their norm before."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        assert norm is not None, "Accelerate returns None for DeepSpeed only"
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all processes."""
        return self.accelerator.reduce(tensor, reduction="sum")  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Hook:
    """A function called after every `every` steps and after the last one."""

    every: int
    call: Callable[[Run], object]

    def is_due(self, run: Run) -> bool:
        """Return whether the step just done is one of its steps."""
        return run.state.step % self.every == 0 or run.state.step == run.plan.total_steps


def train(run: Run, hooks: Sequence[Hook], save: Callable[[Run], None]) -> None:
    """Train from `run.state.step` to the plan's last step, calling the due `hooks` in order after each step.

    Raises `Interrupted` after a signal, when the step is finished and `save` has been called. Raises `UserError` when
    the loss or a gradient is no longer finite, before that reaches the weights; `save` has then been called too.
    """
    params, budget, state = run.plan.params.train, run.plan.budget, run.state
    with closing(run.micro_batches()) as batches:
        run.model.train()
        while state.step < budget.total_steps:
            started_at, step = time.perf_counter(), state.step
            with cached_weights(run.model):
                losses = accumulate_gradients(run, batches, mtp_loss_weight(step, params, budget))
            grad_norm = run.clip_grad_norm(params.max_grad_norm)
            measured = reduce_metrics(run, losses, grad_norm)
            if not measured.is_finite:
                save(run)
                raise UserError(non_finite_message(run, measured))

            run.optimizer.set_learning_rate(learning_rate(step, params, budget))
            run.optimizer.set_ema_decay(ema_decay(step, params))
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            update_router_bias(run.model.routers(), measured.load_LE, bias_update_rate(step, params, budget))

            state.advance(measured, time.perf_counter() - started_at)
            for hook in hooks:
                if hook.is_due(run):
                    hook.call(run)
            if measured.is_interrupted:
                save(run)
                where = f"stopped after step {state.step} of {budget.total_steps}, saved"
                raise Interrupted(where, run.interruption.exit_status)


def accumulate_gradients(run: Run, batches: Iterator[Tensor], mtp_weight: float) -> Tensor:
    """Add up the gradients of the step's mean loss; return this process's sums of the loss parts as fp64.

    Replicas exchange gradients once, in the last backward pass. Shards are exchanged in each: a process would else hold
    the whole model's gradients between them.
    """
    numbers = list(run.layout.micro_batches(range(run.state.step, run.state.step + 1)))
    sums = torch.zeros(len(LOSS_PARTS), dtype=torch.float64, device=run.accelerator.device)
    for number in numbers:
        tokens = next(batches).to(run.accelerator.device, non_blocking=True)
        with nullcontext() if number == numbers[-1] else run.accelerator.no_sync(run.forward):
            output = micro_batch_output(run, run.forward, number, tokens, mtp_weight)
            assert output.loss is not None, "targets were given"
            run.accelerator.backward(output.loss / len(numbers))
        sums += torch.stack([sums.new_zeros(()) if part is None else part.double() for part in loss_parts(run, output)])
    return sums


def micro_batch_output(
    run: Run, forward: Callable[..., DeepseekV3CausalLMOutput], number: int, tokens: Tensor, mtp_weight: float
) -> DeepseekV3CausalLMOutput:
    """Return the losses that `forward`, the model in one of its forms, gives for a micro-batch (B, S + 1).

    Random numbers (dropout, replaced tokens) are a function of the micro-batch's number in the run: they depend neither
    on the number of processes nor on where a training was resumed.
    """
    torch.manual_seed((run.plan.params.seed * 1_000_003 + number) % 2**64)  # torch takes no more bits
    with run.teaching(number, tokens[:, :-1]):
        return forward(
            input_ids=run.input_ids(number, tokens[:, :-1]),
            position_ids=run.position_ids(tokens[:, :-1]),
            shift_labels=tokens[:, 1:],
            mtp_loss_weight=mtp_weight,
            sequence_loss_weight=run.plan.params.train.sequence_loss_weight,
        )


def loss_parts(run: Run, output: DeepseekV3CausalLMOutput) -> list[Tensor | None]:
    """Return the values of `LOSS_PARTS` of a micro-batch; all but the total are the text's alone, whoever teaches."""
    values = {name: getattr(output, field) for name, field in LOSS_PARTS.items()}
    if run.distillation is not None:
        main, *further = run.distillation.text_losses
        values |= {"loss": main, "mtp_loss": torch.stack(further).mean() if further else None}
    return [None if value is None else value.detach() for value in values.values()]


def reduce_metrics(run: Run, loss_sums: Tensor, grad_norm: Tensor) -> Measured:
    """Return what all processes measured together. Here the host waits for the device, once per step.

    One wait, before the optimizer's kernels are launched: they then run while the host prepares the next step. (Counts
    of tokens are exact in fp64.)
    """
    was_stopped, accumulation = float(run.interruption.signal_number), run.layout.accumulation(run.state.step)
    sums = run.all_reduce(torch.cat([loss_sums, loss_sums.new_full((1,), was_stopped)]))
    load_LE = pop_expert_load(run.model.routers(), run.all_reduce)
    numbers = torch.cat([sums, grad_norm.detach().reshape(1).to(sums), load_LE.flatten().to(sums)]).cpu()
    *losses, stopped, norm = numbers[: len(sums) + 1].tolist()
    return Measured(
        losses={name: value / accumulation for name, value in zip(LOSS_PARTS, losses, strict=True)},
        grad_norm=norm,
        is_interrupted=stopped > 0,
        load_LE=load_LE,
        host_load_LE=numbers[len(sums) + 1 :].view(load_LE.shape).long(),
    )


def non_finite_message(run: Run, measured: Measured) -> str:
    """Return the one line that names the step, the sequences and the remedy."""
    first, end = (run.plan.sequences_before(step) for step in (run.state.step, run.state.step + 1))
    return (
        f"step {run.state.step}: loss is {measured.losses['total_loss']}, gradient norm {measured.grad_norm}; must be "
        f"finite; sequences {first} to {end - 1} of the run, weights before the step "
        "are saved and would meet it again; lower train.learning_rate or raise train.warmup_ratio"
    )

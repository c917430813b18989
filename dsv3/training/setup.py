"""From a plan to a training that is ready to begin: device, precision, model, optimizer."""

import os
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    TorchDynamoPlugin,
    broadcast_object_list,
)

from dsv3.artifacts import read_json
from dsv3.data.batches import StepLayout
from dsv3.dependencies import dependencies, syntax_digests
from dsv3.devices import device_name, torch_device
from dsv3.errors import UserError
from dsv3.kernels.convert import Conversion, convert, emulate_bf16
from dsv3.sizing.chunked_loss import is_loss_chunked
from dsv3.training.attention import choose_attention
from dsv3.training.checkpoint import FORMAT_VERSION
from dsv3.training.distillation import Distillation
from dsv3.training.fingerprint import Fingerprint
from dsv3.training.interruption import Interruption
from dsv3.training.launch import check_environment, check_sharding
from dsv3.training.loop import Run
from dsv3.training.loss import chunked_cross_entropy
from dsv3.training.model import CPU, META, build_model
from dsv3.training.optimizer import Optimizer, parameter_groups
from dsv3.training.plan import TrainingPlan
from dsv3.training.precision import (
    COMPUTE_DTYPES,
    autocast_dtype,
    fp8_recipe,
    register_training_experts,
    resolved_precision,
)
from dsv3.training.regularization import drop_hidden
from dsv3.training.sharding import Sharding, shard_model
from dsv3.training.state import TrainState
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM

LAUNCHED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Launches that leave sharding to `runtime.sharding`. Accelerate's own has no checkpoints that fit, and on a CPU it
ignores what it is asked for."""


@dataclass(frozen=True)
class Choices:
    """What was chosen for every `auto`; recorded with the run."""

    device: str
    num_processes: int
    precision: str
    """How linear layers multiply: fp32, bf16, fp8, or an emulation of one, labelled so."""

    experts: str
    attention: str
    """The kernel, torch's or the project's own."""

    cross_entropy: str
    sharding: str
    """Of weights, gradients and optimizer state over the processes."""

    high_precision_linears: tuple[str, ...]
    """Linear layers that were left out when the others were converted."""

    fp8_linears: str | None = None
    """What multiplies them where the GPU does so in FP8: scaled_mm, which is cuBLAS, or triton."""

    def summary(self) -> str:
        """Return a line for the terminal."""
        kept = ", ".join(name.removeprefix("model.") for name in self.high_precision_linears)
        beside = f"; in high precision: {kept}" if kept else ""
        linears = f"linear layers in {self.precision}" + (f" by {self.fp8_linears}" if self.fp8_linears else "")
        by = f"experts by {self.experts}, attention by {self.attention}"
        return f"runs     on {self.device}, {linears}, {by}{beside}"

    def metrics(self) -> dict[str, str | int]:
        """Return what stands among a training's metrics, where DVC takes no lists."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, (str, int))}


def start_accelerator(plan: TrainingPlan) -> Accelerator:
    """Return Accelerate's view of devices and processes; raise `UserError` where they do not fit the plan."""
    train = plan.params.train
    check_environment(plan.params.runtime)
    if plan.params.runtime.full_determinism:
        choose_deterministic_algorithms()
    device = torch_device(plan.params.runtime)
    on_cpu = device.type == "cpu"
    local_processes, num_devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if not on_cpu and local_processes > num_devices:
        raise UserError(
            f"params.yaml: runtime.num_processes is {local_processes}; must be <= {num_devices}, this machine's GPUs"
        )
    has_unused_parameters = min(train.mtp_loss_weight, train.mtp_loss_weight_final) == 0
    # Checkpoints, and shards that lie in the CPU's memory, are exchanged by gloo.
    backend = {"backend": "cpu:gloo,cuda:nccl"} if plan.params.runtime.sharding != "none" and not on_cpu else {}
    # Buffers are not broadcast: each process counts its own tokens, and biases are equal because their updates are.
    kwargs: list[KwargsHandler] = [
        # Gradients are views of the buckets in which they are exchanged, or there would be two of each.
        DistributedDataParallelKwargs(
            broadcast_buffers=False, find_unused_parameters=has_unused_parameters, gradient_as_bucket_view=True
        ),
        InitProcessGroupKwargs(timeout=timedelta(seconds=plan.params.runtime.ddp_timeout), **backend),
        # A layer that is recomputed casts its weights again; autocast would cache all casts until the pass ends.
        AutocastKwargs(cache_enabled=not train.gradient_checkpointing),
    ]
    uses_autocast = autocast_dtype(train.precision, device) == torch.bfloat16
    # Everything that Accelerate would else take from the environment. The plugins also beat it where arguments do not.
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if uses_autocast else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no", mode="default", fullgraph=False, dynamic=False),  # pyright: ignore[reportArgumentType] -- it takes the name
        kwargs_handlers=kwargs,
    )
    if accelerator.distributed_type not in LAUNCHED:
        raise UserError(
            f"the launcher asks for {accelerator.distributed_type.value}; must be one of its plain launches; launch it "
            "with configs/accelerate/ddp.yaml, and set runtime.sharding"
        )
    check_sharding(plan.params, accelerator.num_processes, plan.architecture.n_routed_experts)
    check_agreement(plan)
    smallest = train.gradient_accumulation_steps // train.batch_ramp_levels
    if smallest % accelerator.num_processes:
        raise UserError(
            f"params.yaml: train.gradient_accumulation_steps / train.batch_ramp_levels is {smallest}; must be a "
            f"multiple of the {accelerator.num_processes} processes that were launched"
        )
    return accelerator


def choose_deterministic_algorithms() -> None:
    """Let torch take only algorithms that give the same bits every time, and raise where it has none.

    cuBLAS reads its variable when it multiplies for the first time.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)


def check_agreement(plan: TrainingPlan) -> None:
    """Raise `UserError` where `runtime.sharding: auto` chose otherwise on the main process, whose machine differs."""
    own = plan.params.runtime.sharding
    if plan.sharding_note and broadcast_object_list([own])[0] != own:
        raise UserError(
            f"params.yaml: runtime.sharding is auto; chooses {own} here and another on the main process, whose machine "
            "has another size of memory; name one of them"
        )


def prepare_model(plan: TrainingPlan, device: torch.device) -> tuple[DeepseekV3ForCausalLM, Choices]:
    """Return the initialized model, made to compute on `device` as the parameters ask, and what was chosen.

    Raises `UserError` for what can't run there.
    """
    train, sharding = plan.params.train, plan.params.runtime.sharding
    is_filled = sharding == "none" or os.environ.get("RANK", "0") == "0"  # the main process's weights are cut for all
    model = build_model(Path(plan.params.model.config), plan.params.seed, CPU if is_filled else META)
    if plan.initial_weights is not None and is_filled:
        plan.initial_weights.copy_into(model)
    precision = resolved_precision(train.precision, device)
    experts = register_training_experts(train, plan.architecture, device)
    model.set_experts_implementation(experts)
    conversion = Conversion(precision)
    if train.use_fp8:
        conversion = convert(model, fp8_recipe(train), device)
    elif precision == "bf16" and autocast_dtype(train.precision, device) == torch.float32:
        conversion = emulate_bf16(model)
    num_rows = train.per_device_train_batch_size * train.block_size
    is_chunked = is_loss_chunked(num_rows, plan.architecture.vocab_size)
    if is_chunked:
        model.cross_entropy = chunked_cross_entropy
    if train.hidden_dropout:
        drop_hidden(model, train.hidden_dropout)
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if train.torch_compile:
        model.compile()
    return model, Choices(
        device=device_name(device),
        num_processes=int(os.environ.get("WORLD_SIZE", "1")),
        precision=conversion.precision,
        experts=experts,
        attention=choose_attention(model, plan.architecture, train, device),
        cross_entropy="distilled, one teacher in turn" if plan.teachers else "chunked" if is_chunked else "plain",
        sharding=sharding,
        high_precision_linears=tuple(conversion.high_precision),
        fp8_linears=conversion.kernel(device, num_rows, COMPUTE_DTYPES[precision]),
    )


def run_fingerprint(plan: TrainingPlan, chosen: Choices) -> Fingerprint:
    """Return what shapes the weights: parameters, architecture, first weights, data, formats, the code's syntax.

    Not in it: `runtime`, the device and the number of processes, which change at most the rounding, so that a training
    may go on elsewhere.
    """
    initial = {} if plan.initial_weights is None else {"initial_weights": plan.initial_weights.sha256}
    teachers = {"teachers": [teacher.sha256 for teacher in plan.teachers]} if plan.teachers else {}
    return Fingerprint(
        {
            **initial,
            **teachers,
            "format": FORMAT_VERSION,
            "seed": plan.params.seed,
            "train": plan.params.train.model_dump(),
            "architecture": read_json(Path(plan.params.model.config)),
            "tokens": plan.meta["sha256"],
            "precision": chosen.precision,
            "experts": chosen.experts,
            "code": syntax_digests(dependencies("train")),
        }
    )


def prepare_run(
    plan: TrainingPlan, accelerator: Accelerator, model: DeepseekV3ForCausalLM, interruption: Interruption
) -> Run:
    """Return a training at step 0: the model wrapped for its processes, the optimizer empty."""
    train = plan.params.train
    shards = plan.params.runtime.sharding != "none"
    if shards:
        runtime = plan.params.runtime
        sharding = Sharding(
            within_machines=runtime.sharding == "hybrid",
            expert_parallel=runtime.expert_parallel,
            reshard_after_forward=runtime.reshard_after_forward,
            offloads=runtime.cpu_offload == "parameters",
        )
        shard_model(model, sharding, accelerator.device)
    distillation = None
    if plan.teachers:
        folders = [teacher.folder for teacher in plan.teachers]
        plain = model.cross_entropy
        distillation = Distillation.of(folders, train.distillation_weight, plain, accelerator.device)
        model.cross_entropy = distillation.cross_entropy
    # Muon's matrix products run in the training's own format: bf16 where the device is fast at it, else fp32.
    dtype = autocast_dtype(train.precision, accelerator.device)
    offloads = plan.params.runtime.cpu_offload == "optimizer"
    optimizer = Optimizer(parameter_groups(model, train), train, dtype, offloads)
    with warnings.catch_warnings():
        # torch 2.13 names a successor of broadcast_buffers that Accelerate 1.15 can't pass on.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        forward = accelerator.prepare_model(model, device_placement=not shards, evaluation_mode=shards)
    return Run(
        plan=plan,
        accelerator=accelerator,
        layout=StepLayout(
            train.per_device_train_batch_size,
            plan.budget.starts,
            accelerator.process_index,
            accelerator.num_processes,
        ),
        model=model,
        forward=forward,
        optimizer=optimizer,
        state=TrainState(),
        interruption=interruption,
        distillation=distillation,
    )

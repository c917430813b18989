"""The memory that a training and an inference need, in bytes, before either is started.

Training holds at any moment the fp32 master weights and the optimizer's moments. On top of them, two things take turns:

- the *pass*: quantized or rounded copies of weights are there, which all passes of a step share; activations, casts
  of weights and logits grow until the backward pass begins, and shrink as it proceeds,
  while the gradients, which no one holds between two optimizer steps, grow by about as much as a layer of activations
  frees. With accumulation the gradients of the earlier passes are there as well.
- the *step*: all gradients, and what the optimizer needs to compute the update.

The peak is the larger of the two. It leaves out the allocator's fragmentation, the CUDA context, the libraries'
workspaces and the buckets of several processes; `machines.py` keeps a share of each device free for them.

Inference holds the weights and, per token of context and layer, one latent and one rotary key: what MLA caches instead
of keys and values per head.
"""

from dataclasses import dataclass, replace

from dsv3.params.architecture import Architecture
from dsv3.params.expert_backends import BACKENDS, auto_of_native_device, has_fp8_kernels
from dsv3.params.optimizers import MAX_BATCH_NUMBERS, OPTIMIZERS
from dsv3.params.runtime import Device
from dsv3.params.train import TrainParams
from dsv3.sizing.activations import (
    BF16,
    DTYPE_BYTES,
    FP32,
    INT64,
    Workload,
    activation_bytes,
    all_layers,
    derived_weight_bytes,
    logits_bytes,
    recomputed_bytes,
    weight_cast_bytes,
)
from dsv3.sizing.parameters import (
    attention_biases,
    mtp_parameters_by_part,
    num_mtp_parameters,
    num_parameters,
    num_router_biases,
    parameters_by_part,
)

GIB = 1 << 30


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device; `peak_bytes` is their largest simultaneous sum."""

    weights_bytes: int
    """fp32 master weights and the router's buffers, MTP modules included."""
    optimizer_states_bytes: int
    gradients_bytes: int
    activations_bytes: int
    """What all layers keep until the backward pass."""
    recomputed_bytes: int
    """With gradient checkpointing: the layer that is computed again, when the logits are gone."""
    weight_casts_bytes: int
    """bf16 copies of weights, made in each pass."""
    derived_weights_bytes: int
    """Quantized or rounded copies of weights, which the passes of an optimizer step share; freed before the update."""
    logits_bytes: int
    """Output head, loss and its gradient."""
    optimizer_workspace_bytes: int
    holds_gradients: bool
    """Whether gradients of earlier passes exist during a pass (accumulation)."""
    teachers_bytes: int = 0
    """Weights of other models that it learns from, each counted as large as the model itself."""
    gathered_bytes: int = 0
    """On several processes: what a pass holds of the others' weights and gradients (`dsv3.sizing.sharded`)."""

    @property
    def pass_bytes(self) -> int:
        """The most that a forward and backward pass hold beside weights, their derived copies and moments."""
        in_pass = self.activations_bytes + self.weight_casts_bytes + max(self.logits_bytes, self.recomputed_bytes)
        in_pass += self.gathered_bytes + (self.gradients_bytes if self.holds_gradients else 0)
        # The first layer is computed again when all others have their gradients.
        return max(in_pass, self.gradients_bytes + self.recomputed_bytes)

    @property
    def peak_bytes(self) -> int:
        """The larger of a pass with derived copies of weights and an optimizer step, on top of weights and moments."""
        in_pass = self.pass_bytes + self.derived_weights_bytes
        in_step = self.gradients_bytes + self.optimizer_workspace_bytes
        return self.weights_bytes + self.teachers_bytes + self.optimizer_states_bytes + max(in_pass, in_step)


def workload(train: TrainParams, device: Device) -> Workload:
    """Return the forward pass that `train` asks of one process on `device`; auto is bf16 on CUDA and fp32 on a CPU.

    A CPU that multiplies bf16 natively takes bf16 for auto as well; it keeps less than is counted for fp32, and copies
    of the weights.
    """
    has_kernels = has_fp8_kernels(train.fp8_weight_quant, train.fp8_activation_quant, train.fp8_mx_blocks)
    auto = auto_of_native_device(device, train.use_fp8, has_kernels or not train.use_fp8)
    experts = auto if train.experts == "auto" else train.experts
    native = "bf16" if device == "cuda" else "fp32"
    precision = native if train.precision == "auto" else train.precision
    return Workload(
        num_sequences=train.per_device_train_batch_size,
        sequence_tokens=train.block_size,
        device=device,
        precision="fp32" if BACKENDS[experts].is_emulated else precision,
        experts=experts,
        swiglu_cache=train.use_fp8 and train.fp8_swiglu_cache,
        mx_blocks=train.use_fp8 and train.fp8_mx_blocks,
        gradient_checkpointing=train.gradient_checkpointing,
        drops_hidden=train.hidden_dropout > 0,
        cross_document_attention=train.cross_document_attention,
        has_teachers=bool(train.teachers),
    )


def training_memory(a: Architecture, train: TrainParams, device: Device) -> TrainingMemory:
    """Return what training `a` as `train` says takes on one device."""
    w = workload(train, device)
    has_rounded_weights = train.fp8_weight_quant or not train.use_fp8
    total = num_parameters(a) + num_mtp_parameters(a)
    matrices = num_matrix_parameters(a)
    moments = OPTIMIZERS["adamw"].moments * (total - matrices) + OPTIMIZERS[train.optim].moments * matrices
    return TrainingMemory(
        weights_bytes=FP32 * total + (FP32 + INT64) * num_router_biases(a),
        optimizer_states_bytes=DTYPE_BYTES[train.adam_moments_dtype] * moments + average_bytes(train, total),
        gradients_bytes=FP32 * total,
        activations_bytes=activation_bytes(a, w),
        recomputed_bytes=recomputed_bytes(a, w),
        weight_casts_bytes=weight_cast_bytes(a, w),
        derived_weights_bytes=derived_weight_bytes(a, w) if has_rounded_weights else 0,
        logits_bytes=logits_bytes(a, w),
        optimizer_workspace_bytes=optimizer_workspace_bytes(a, train, w.compute_bytes),
        holds_gradients=train.gradient_accumulation_steps > 1,
        teachers_bytes=len(train.teachers) * FP32 * total,
    )


def average_bytes(train: TrainParams, num_parameters: int) -> int:
    """Return the bytes of the moving average of so many parameters, which lies beside the moments."""
    return FP32 * num_parameters if train.ema_decay else 0


def without_moments(memory: TrainingMemory, a: Architecture, train: TrainParams) -> TrainingMemory:
    """Return what a training takes on a GPU where the moments lie in the CPU's memory (`runtime.cpu_offload`).

    One parameter's moments at a time are copied to the GPU.
    """
    largest = num_largest_parameter(a)
    moments = DTYPE_BYTES[train.adam_moments_dtype] * OPTIMIZERS["adamw"].moments * largest
    copied = max(moments, average_bytes(train, largest))
    workspace = memory.optimizer_workspace_bytes + copied
    return replace(memory, optimizer_states_bytes=0, optimizer_workspace_bytes=workspace)


def num_matrix_parameters(a: Architecture) -> int:
    """Return the parameters that `train.optim` updates: all matrices but those of AdamW (embedding, head, routers)."""
    parts = parameters_by_part(a) + mtp_parameters_by_part(a)
    maps = ("attention", "dense_mlp", "routed_experts", "shared_experts", "projection")
    return sum(parts[part] for part in maps) - len(all_layers(a)) * attention_biases(a)


def num_stack_parameters(a: Architecture) -> int:
    """Return the size of a layer's stack of gate and up projections, its largest parameter."""
    return 2 * a.n_routed_experts * a.moe_intermediate_size * a.hidden_size


def num_largest_parameter(a: Architecture) -> int:
    """Return the size of the largest parameter."""
    return max(num_stack_parameters(a), a.vocab_size * a.hidden_size)


def optimizer_workspace_bytes(a: Architecture, train: TrainParams, compute_bytes: int, num_shards: int = 1) -> int:
    """Return what an optimizer step needs beside weights, gradients and moments, on one of `num_shards` processes.

    bf16 moments are widened one parameter at a time. Updates that are made of matrix products are in the type that the
    device multiplies, and a batch of equal shapes is computed at once; the product of a matrix with its own transpose
    is as wide as the matrix is high.
    """
    optimizer, (batch, width) = OPTIMIZERS[train.optim], largest_batch(a, num_shards)
    short, long = sorted((a.hidden_size, width))
    numbers = optimizer.update_copies * num_matrix_parameters(a) // num_shards + optimizer.batch_copies * batch
    numbers += optimizer.gram_copies * batch * short // long
    largest_parameter = num_largest_parameter(a) // num_shards
    widened = optimizer.widened_copies * largest_parameter if train.adam_moments_dtype == "bf16" else 0
    return compute_bytes * numbers + FP32 * widened


def largest_batch(a: Architecture, num_shards: int) -> tuple[int, int]:
    """Return the size of the largest batch of equally shaped matrices that are updated together, and their width.

    They are the experts', or the dense layers'. Shared experts are among them where they have the routed ones' shape,
    unless several processes hold their rows.
    """
    parts = parameters_by_part(a) + mtp_parameters_by_part(a)
    shared = parts["shared_experts"] if a.n_shared_experts == num_shards == 1 else 0
    stack = num_stack_parameters(a) // num_shards
    experts = min(parts["routed_experts"] // num_shards + shared, max(MAX_BATCH_NUMBERS, stack))
    dense = min(parts["dense_mlp"] // num_shards, max(MAX_BATCH_NUMBERS, a.hidden_size * a.intermediate_size))
    return max((experts, a.moe_intermediate_size), (dense, a.intermediate_size))


def inference_weights_bytes(a: Architecture, dtype: str) -> int:
    """Return the weights of the main network as they are served: fp32, bf16, or DeepSeek's FP8 format.

    FP8 holds the linear layers at one byte and an fp32 scale per 128x128 block; embedding, head, routers and norms stay
    in bf16, and the router's bias is fp32 in every case.
    """
    parts = parameters_by_part(a)
    bias = FP32 * a.num_moe_layers * a.n_routed_experts
    if dtype != "fp8":
        return DTYPE_BYTES[dtype] * sum(parts.values()) + bias
    quantized = sum(parts[part] for part in ("attention", "dense_mlp", "routed_experts", "shared_experts"))
    return quantized + FP32 * quantized // (128 * 128) + BF16 * (sum(parts.values()) - quantized) + bias


def kv_cache_bytes_per_token(a: Architecture, dtype: str) -> int:
    """Return the bytes that one token of context occupies: its latent and its rotary key, in every layer."""
    return a.num_hidden_layers * (a.kv_lora_rank + a.qk_rope_head_dim) * DTYPE_BYTES[dtype]

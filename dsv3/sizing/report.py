"""The estimates as they are stored: flat metrics of the chosen architecture, and a table of all of them."""

from pathlib import Path
from typing import Any

from dsv3.errors import UserError
from dsv3.markdown import escaped
from dsv3.params.architecture import Architecture
from dsv3.params.estimate_size import EstimateSizeParams
from dsv3.params.runtime import Device
from dsv3.params.train import TrainParams
from dsv3.sizing.flops import (
    decoding_flops_per_token,
    forward_flops_per_token,
    mean_keys,
    training_flops_per_token,
)
from dsv3.sizing.machines import MACHINES, best_fit
from dsv3.sizing.memory import GIB, inference_weights_bytes, kv_cache_bytes_per_token, training_memory
from dsv3.sizing.parameters import (
    num_active_parameters,
    num_mtp_parameters,
    num_parameters,
    num_router_biases,
    parameters_by_part,
)
from dsv3.sizing.sharded import process_memory, ways_of_sharing

DEVICES: tuple[Device, ...] = ("cpu", "cuda")


def metrics(a: Architecture, train: TrainParams, inference: EstimateSizeParams) -> dict[str, int | float]:
    """Return every estimate of one architecture under a flat name with its unit."""
    return {
        **parameter_metrics(a),
        **training_metrics(a, train),
        **inference_metrics(a, inference),
        **flops_metrics(a, train),
    }


def training_size(a: Architecture, train: TrainParams) -> dict[str, int | float]:
    """Return what a training records of its size: the estimates that no other section has a part in."""
    return {**parameter_metrics(a), **training_metrics(a, train), **flops_metrics(a, train)}


def parameter_metrics(a: Architecture) -> dict[str, int | float]:
    """Return the numbers of parameters: in all, active per token, and by part."""
    return {
        "parameters_total": num_parameters(a),
        "parameters_active": num_active_parameters(a),
        **{f"parameters_{part}": count for part, count in parameters_by_part(a).items()},
        "parameters_mtp": num_mtp_parameters(a),
        "buffers_router_bias": num_router_biases(a),
    }


def training_metrics(a: Architecture, train: TrainParams) -> dict[str, int | float]:
    """Return the training memory on a CPU and on CUDA: peaks in GiB, and what makes them up in bytes."""
    result: dict[str, int | float] = {}
    for device in DEVICES:
        memory = training_memory(a, train, device)
        result["training_weights_bytes"] = memory.weights_bytes
        result["training_gradients_bytes"] = memory.gradients_bytes
        result["training_optimizer_states_bytes"] = memory.optimizer_states_bytes
        result[f"training_{device}_activations_bytes"] = memory.activations_bytes
        result[f"training_{device}_recomputed_bytes"] = memory.recomputed_bytes
        result[f"training_{device}_weight_casts_bytes"] = memory.weight_casts_bytes
        result[f"training_{device}_derived_weights_bytes"] = memory.derived_weights_bytes
        result[f"training_{device}_logits_bytes"] = memory.logits_bytes
        result[f"training_{device}_optimizer_workspace_bytes"] = memory.optimizer_workspace_bytes
        result[f"training_{device}_peak_gib"] = round(memory.peak_bytes / GIB, 4)
    return result


def inference_metrics(a: Architecture, inference: EstimateSizeParams) -> dict[str, int | float]:
    """Return the memory of serving one sequence of `context_tokens`."""
    weights = inference_weights_bytes(a, inference.inference_dtype)
    per_token = kv_cache_bytes_per_token(a, inference.kv_cache_dtype)
    cache = per_token * inference.context_tokens
    return {
        "inference_weights_bytes": weights,
        "inference_kv_cache_bytes_per_token": per_token,
        "inference_kv_cache_bytes": cache,
        "inference_total_gib": round((weights + cache) / GIB, 4),
        "inference_decoding_flops_per_token": int(decoding_flops_per_token(a, inference.context_tokens)),
    }


def flops_metrics(a: Architecture, train: TrainParams) -> dict[str, int | float]:
    """Return the arithmetic of a training: per token, per optimizer step, and in total where `max_steps` fixes it."""
    step_tokens = train.per_device_train_batch_size * train.gradient_accumulation_steps * train.block_size
    per_token = training_flops_per_token(a, train.block_size)
    result: dict[str, int | float] = {
        "forward_flops_per_token": int(forward_flops_per_token(a, mean_keys(train.block_size))),
        "training_flops_per_token": int(per_token),
        "training_tokens_per_step": step_tokens,
        "training_flops_per_step": int(per_token * step_tokens),
    }
    if train.max_steps > 0 and train.batch_ramp_levels == 1:  # with a ramp the plan of the training says it
        result["training_flops_total"] = int(per_token * step_tokens * train.max_steps)
    return result


def table_row(path: Path, a: Architecture, train: TrainParams, inference: EstimateSizeParams) -> dict[str, Any]:
    """Return the table's row of one architecture: sizes at its own context length, and what it can be trained on."""
    sequence_tokens = a.max_position_embeddings
    fit_by_machine = {machine.name: best_fit(a, train, sequence_tokens, machine) for machine in MACHINES}
    return {
        "config": path.name,
        "parameters_total": num_parameters(a),
        "parameters_active": num_active_parameters(a),
        "parameters_mtp": num_mtp_parameters(a),
        "sequence_tokens": sequence_tokens,
        "training_flops_per_token": int(training_flops_per_token(a, sequence_tokens)),
        **inference_metrics(a, inference),
        "fits": {
            name: {"settings": fit.settings, "num_sequences": fit.num_sequences} if fit else None
            for name, fit in fit_by_machine.items()
        },
    }


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as two Markdown tables: the sizes, and the largest forward pass on each machine."""
    sizes = [
        [
            escaped(row["config"]),
            f"{row['parameters_total']:,}",
            f"{row['parameters_active']:,}",
            f"{row['parameters_mtp']:,}",
            f"{row['training_flops_per_token'] / 1e9:.3g}",
            f"{row['inference_kv_cache_bytes_per_token']:,}",
            f"{row['inference_total_gib']:.3g}",
        ]
        for row in rows
    ]
    header = ["config", "parameters", "active per token", "MTP", "training GFLOP per token", "KV cache bytes per token"]
    fits = [[machine.name, *(shown_fit(row["fits"][machine.name]) for row in rows)] for machine in MACHINES]
    names = [f"{escaped(row['config'])}, sequences of {row['sequence_tokens']}" for row in rows]
    return "\n".join(
        [
            "# Sizes",
            "",
            *markdown_lines([*header, "inference GiB"], sizes),
            "",
            "# What fits where",
            "",
            "Sequences in one forward pass of a training with AdamW, bf16 on CUDA and fp32 on a CPU, and the settings",
            "that they take: fp32 moments, bf16 moments, or gradient checkpointing as well. Estimated, not measured.",
            "",
            *markdown_lines(["machine", *names], fits),
            "",
        ]
    )


def markdown_lines(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table whose columns are aligned in plain text too."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    aligned = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, rule, *rows]]
    return [f"| {' | '.join(row)} |" for row in aligned]


def process_table(a: Architecture, train: TrainParams, num_processes: int) -> list[str]:
    """Return the lines of a Markdown table: what each of `num_processes` holds and needs, by `runtime.sharding`."""
    header = ["runtime.sharding", "weights", "gradients", "optimizer", "gathered", "peak on a CPU", "peak on a GPU"]
    rows = []
    for name, sharing in ways_of_sharing(a, num_processes).items():
        on_cpu, on_cuda = (process_memory(a, train, device, sharing) for device in DEVICES)
        kinds = (on_cuda.weights_bytes, on_cuda.gradients_bytes, on_cuda.optimizer_states_bytes, on_cuda.gathered_bytes)
        rows.append([name, *(f"{value / GIB:,.2f}" for value in (*kinds, on_cpu.peak_bytes, on_cuda.peak_bytes))])
    return markdown_lines(header, rows)


def shown_fit(fit: dict[str, Any] | None) -> str:
    """Return one cell of the second table."""
    return f"{fit['num_sequences']} ({fit['settings']})" if fit else "no"


def check_budget(a: Architecture, train: TrainParams, device: Device, budget_gib: float | None) -> None:
    """Raise `UserError` where the training's peak on `device` exceeds the budget; None is no budget."""
    peak_gib = training_memory(a, train, device).peak_bytes / GIB
    if budget_gib is not None and peak_gib > budget_gib:
        raise UserError(
            f"estimate_size.memory_budget_gib is {budget_gib:g}; training needs {peak_gib:.2f} GiB on {device}: lower "
            "train.per_device_train_batch_size, or set train.gradient_checkpointing to true"
        )

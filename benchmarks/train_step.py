"""One training step of a model: this project's, in every precision the device has, beside stock transformers'.

A step is forward, backward, clipping and the optimizer's update on random tokens. All contestants stand in one process
and are timed in turn; medians, and on a CPU the speed over stock's, round by round. The model FLOPs' utilization is the
sizing stage's FLOPs per token over the time, as a share of one large bf16 product's (fp32 on a CPU) speed in the same
run.

    python -m benchmarks.train_step                                                   nano as params.yaml trains it
    python -m benchmarks.train_step --config mini_model/config_tiny.json --batch 16 --block 4096
    python -m benchmarks.train_step --only "ours;ours, fp8" --profile                 where the time goes, by kernel

Stock is transformers' own class with torch's fused AdamW, by its default experts and by its `grouped_mm`.
"""

import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import DeepseekV3Config as StockConfig
from transformers import DeepseekV3ForCausalLM as StockModel

from benchmarks.timing import (
    Functions,
    best_device,
    check_json,
    conditions,
    elapsed_s,
    median_ratio,
    medians_s,
    paired_s,
)
from dsv3.artifacts import read_json
from dsv3.cli import command
from dsv3.devices import multiplies_fp8
from dsv3.fp8.recipe import Recipe
from dsv3.kernels.convert import convert, emulate_bf16
from dsv3.kernels.registry import register_experts
from dsv3.kernels.weight_cache import cached_weights
from dsv3.params.architecture import Architecture
from dsv3.params.read import read_params
from dsv3.params.train import TrainParams
from dsv3.sizing.chunked_loss import is_loss_chunked
from dsv3.sizing.flops import training_flops_per_token
from dsv3.training.attention import choose_attention
from dsv3.training.balancing import pop_expert_load
from dsv3.training.loss import chunked_cross_entropy
from dsv3.training.model import build_model
from dsv3.training.optimizer import Optimizer, parameter_groups

ROOT = Path(__file__).parent.parent
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
Step = Callable[[], Tensor]
"""Does one optimizer step; returns the loss."""


@dataclass(frozen=True)
class Setting:
    """What all contestants train."""

    config: Path
    batch: int
    block: int
    precision: str
    """fp32 | bf16 (autocast) | bf16_emulated"""
    checkpointing: bool
    bf16_moments: bool
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of what experts multiply."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def autocast(self) -> torch.autocast:
        """Return the context that a forward pass runs in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def tokens(self, vocab_size: int) -> Tensor:
        """Return random sequences with one token more than the block."""
        return torch.randint(0, vocab_size, (self.batch, self.block + 1), device=self.device)

    def train_params(self, **values: object) -> TrainParams:
        """Return the project's parameters with these values."""
        own = {"block_size": self.block, "adam_moments_dtype": "bf16" if self.bf16_moments else "fp32", **values}
        return read_params(ROOT / "params.yaml").train.model_copy(update=own)


def our_step(setting: Setting, optim: str = "adamw", recipe: Recipe | None = None, compiles: bool = False) -> Step:
    """Return this project's step; with a `recipe` its linear layers and experts run in FP8."""
    device, is_emulated = setting.device, setting.precision == "bf16_emulated"
    dtype, params = setting.dtype, setting.train_params(optim=optim, ema_decay=0.0)
    with device:  # the 5.69B model's random numbers take a CPU most of a minute
        model = build_model(setting.config, seed=0).train()
    experts = "bf16_emulated" if is_emulated else "auto"
    model.set_experts_implementation(register_experts(experts, device, dtype, recipe is not None, recipe or Recipe()))
    if recipe is not None:
        convert(model, recipe, device)
    elif is_emulated:
        emulate_bf16(model)
    choose_attention(model, Architecture(**read_json(setting.config)), params, device)
    if is_loss_chunked(setting.batch * setting.block, model.config.vocab_size):
        model.cross_entropy = chunked_cross_entropy
    if setting.checkpointing:
        model.activation_checkpointing_enable()
    if compiles:
        model.compile()
    optimizer = Optimizer(parameter_groups(model, params), params, torch.float32 if is_emulated else dtype)
    tokens = setting.tokens(model.config.vocab_size)

    def step() -> Tensor:
        with cached_weights(model):
            with setting.autocast():
                output = model(
                    tokens[:, :-1], shift_labels=tokens[:, 1:], sequence_loss_weight=params.sequence_loss_weight
                )
            assert output.loss is not None, "targets were given"
            output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), params.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pop_expert_load(model.routers(), lambda load_LE: load_LE)
        return output.loss.detach()

    return step


def stock_step(setting: Setting, experts: str) -> Step:
    """Return the step of transformers' own class, with torch's fused AdamW."""
    config = StockConfig(**{key: value for key, value in read_json(setting.config).items() if key != "architectures"})
    config._attn_implementation, config._experts_implementation = "sdpa", experts
    torch.manual_seed(0)
    with setting.device:
        model = StockModel(config).train()
    if setting.checkpointing:
        model.gradient_checkpointing_enable()
    params, tokens = setting.train_params(), setting.tokens(config.vocab_size)
    targets = tokens[:, 1:].contiguous()
    betas = params.adam_beta1, params.adam_beta2
    optimizer = torch.optim.AdamW(
        model.parameters(), params.learning_rate, betas, params.adam_epsilon, params.weight_decay, fused=True
    )

    def step() -> Tensor:
        with setting.autocast():
            loss = model(tokens[:, :-1], labels=tokens[:, :-1], shift_labels=targets, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), params.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def contestants(setting: Setting) -> dict[str, Callable[[], Step]]:
    """Return what makes each contestant's step, by name."""
    found: dict[str, Callable[[], Step]] = {
        "ours": lambda: our_step(setting),
        "ours, Muon": lambda: our_step(setting, "muon"),
        "ours, compiled": lambda: our_step(setting, compiles=True),
        "stock": lambda: stock_step(setting, "eager"),
        "stock, grouped_mm": lambda: stock_step(setting, "grouped_mm"),
    }
    if multiplies_fp8(setting.device) or setting.device.type == "cpu":
        found["ours, fp8"] = lambda: our_step(setting, recipe=Recipe())
        found["ours, fp8 but wgrad"] = lambda: our_step(setting, recipe=Recipe(wgrad_quant=False))
    return found


def peak_flops_per_s(setting: Setting, rounds: int) -> float:
    """Return the speed of one large matrix product in the setting's precision."""
    size = PEAK_SIZE[setting.device.type]
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=setting.device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / medians_s({"mm": lambda: a @ b}, rounds, setting.device)["mm"]


def with_rates(row: dict[str, Any], setting: Setting, peak: float) -> dict[str, Any]:
    """Add tokens per second and utilization to a row that has a time; return it."""
    if "milliseconds" in row:
        tokens, seconds = setting.batch * setting.block, row["milliseconds"] / 1e3
        flops = training_flops_per_token(Architecture(**read_json(setting.config)), setting.block) * tokens
        row |= {"tokens_per_s": round(tokens / seconds), "utilization": round(flops / seconds / peak, 3)}
    return row


def show(name: str, row: dict[str, Any]) -> None:
    """Print one contestant's line."""
    print(
        f"{name:24}", "  ".join(f"{key} {value:.5g}" if key != "not_measured" else value for key, value in row.items())
    )


def measured(setting: Setting, names: list[str], rounds: int) -> dict[str, Any]:
    """Return for each contestant its time, tokens per second, utilization and, on a GPU, its peak of memory.

    On a GPU each is built, timed and dropped before the next, since two may not fit; on a CPU they are timed in turn.
    """
    makers = {name: make for name, make in contestants(setting).items() if name in names}
    peak = peak_flops_per_s(setting, rounds)
    if setting.device.type == "cuda":
        found = {}
        for name, make in makers.items():
            found[name] = _alone(make, rounds, setting.device)
            show(name, with_rates(found[name], setting, peak))
    else:
        functions: Functions = {name: make() for name, make in makers.items()}
        times = paired_s(functions, rounds, setting.device)
        found = {name: {"milliseconds": statistics.median(values) * 1e3} for name, values in times.items()}
        for name, row in found.items():
            if "stock" in times:
                row["speed_over_stock"] = round(median_ratio(times["stock"], times[name]), 3)
            show(name, with_rates(row, setting, peak))
    return {"peak_tflop_per_s": round(peak / 1e12, 2), "steps": found}


def _alone(make: Callable[[], Step], rounds: int, device: torch.device) -> dict[str, Any]:
    try:
        torch.cuda.reset_peak_memory_stats(device)
        step = make()
        for _ in range(3):
            step()
        found = medians_s({"step": step}, rounds, device)["step"]
        return {"milliseconds": found * 1e3, "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2)}
    except (RuntimeError, ImportError) as error:  # a peer may not run there, and the others are still of interest
        return {"not_measured": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    finally:
        step = None
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def print_profile(setting: Setting, name: str) -> None:
    """Print where one step's time goes, by operator."""
    step = contestants(setting)[name]()
    for _ in range(3):
        step()
    elapsed_s(step, setting.device, lambda: None)
    with torch.profiler.profile() as profile:
        step()
        if setting.device.type == "cuda":
            torch.cuda.synchronize(setting.device)
    key = "self_cuda_time_total" if setting.device.type == "cuda" else "self_cpu_time_total"
    print(f"\n{name}\n{profile.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=60)}")


def main(  # noqa: PLR0913 (options)
    config: Annotated[Path, typer.Option(help="The model's config.json.")] = ROOT / "mini_model/config_nano.json",
    batch: Annotated[int, typer.Option(help="Sequences in a step.")] = 8,
    block: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 256,
    precision: Annotated[str, typer.Option(help="fp32 | bf16; auto: bf16 on a GPU.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu | cuda; auto: the GPU where there is one.")] = "auto",
    only: Annotated[str | None, typer.Option(help="Contestants, separated by semicolons; default: all.")] = None,
    rounds: Annotated[int, typer.Option(help="Measurements of each.")] = 11,
    checkpointing: Annotated[bool, typer.Option(help="Recompute layers in the backward pass.")] = False,
    bf16_moments: Annotated[bool, typer.Option(help="AdamW's moments in bf16 (ours only).")] = False,
    profile: Annotated[bool, typer.Option(help="Print where the time of each goes instead.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures there, too.")] = None,
) -> None:
    """Measure, and print a line per contestant."""
    check_json(json_path)
    chosen = best_device(device)
    precision = ("bf16" if chosen.type == "cuda" else "fp32") if precision == "auto" else precision
    setting = Setting(config, batch, block, precision, checkpointing, bf16_moments, chosen)
    names = list(contestants(setting)) if only is None else only.split(";")
    if profile:
        for name in names:
            print_profile(setting, name)
        return
    shown = {name: str(value) for name, value in asdict(setting).items()} | {"config": config.name}
    results = {"conditions": conditions(chosen), "setting": shown, **measured(setting, names, rounds)}
    print(json.dumps({key: value for key, value in results.items() if key != "steps"}))
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    command(main)

"""Section `runtime`: parameters of the machine that a stage runs on."""

from typing import Literal

from pydantic import Field

from dsv3.params.section import Section

Device = Literal["cpu", "cuda"]

MAX_TIMEOUT_S = 30 * 24 * 3600
"""A month: torch counts in nanoseconds."""

TrackerName = Literal["aim", "tensorboard", "wandb", "trackio"]
"""Every tracker: a module of dsv3/tracking and a package, both of this name."""


class RuntimeParams(Section):
    """Section `runtime`: what differs between machines and changes no result. In no stage's params."""

    device: Literal["auto", "cpu", "cuda"]
    """auto: cuda where there is one."""

    num_processes: int = Field(ge=1)
    """Training processes; must divide train.gradient_accumulation_steps."""

    sharding: Literal["none", "full", "hybrid", "auto"]
    """Of weights, gradients and optimizer state over the processes. none: each process has all of it; full: each has a
    part; hybrid: the processes of one machine share it, and machines hold copies; auto: the first of none, hybrid and
    full whose estimate fits the device (on one process: none)."""

    expert_parallel: int = Field(ge=1)
    """With sharding full: processes that share the experts of a layer and send tokens to each other; 1: experts are
    gathered like other weights. Must divide the number of processes and n_routed_experts."""

    reshard_after_forward: bool
    """With sharding: free a layer's gathered weights after the forward pass and gather them again for the backward
    pass; false: keep them between the two, which is faster and needs the whole model's memory."""

    cpu_offload: Literal["none", "optimizer", "parameters"]
    """What of a GPU's training lies in the CPU's memory. optimizer (without sharding): the moments, copied to
    the GPU one parameter at a time; parameters (with sharding): the shards of weights, gradients and moments, updated
    on the CPU."""

    full_determinism: bool
    """Only algorithms that give the same bits every time, so that a training on a GPU, too, is resumed bit for bit;
    slower there, and torch fills all memory that it takes. A CPU's always do."""

    ddp_timeout: int = Field(ge=1, le=MAX_TIMEOUT_S)
    """Seconds that a process waits for others that are alive and at work (torch's process group): they may be writing,
    exporting or compiling. One that is stopped or cut off is noticed within half a minute, whatever this is."""

    dataloader_num_workers: int = Field(ge=0, le=256)
    """Worker processes that prepare batches; each is a whole Python."""

    dataloader_pin_memory: bool
    """Copy batches into pinned memory first (CUDA only)."""

    logging_steps: int = Field(ge=1)
    """Optimizer steps between two rows of history.tsv."""

    save_steps: int = Field(ge=1)
    """Optimizer steps between two checkpoints."""

    async_save: bool
    """With sharding: write checkpoints beside the steps that follow, from a copy in the CPU's memory, as large as a
    process's share of weights and moments; false: the training waits, and needs no copy."""

    save_total_limit: int = Field(ge=1)
    """Most checkpoints kept."""

    keep_last_checkpoint: bool
    """Keep the last checkpoint of a finished training for good: a longer one, which is another training with a schedule
    of its own, may go on from it (train.resume_from_checkpoint). false: until another training begins."""

    keep_abandoned_days: int = Field(ge=0)
    """Days after which the checkpoints of a training that was stopped are removed when another one begins."""

    resume: Literal["auto", "never", "must"]
    """auto: go on from a checkpoint of the same fingerprint where there is one."""

    trackers: list[TrackerName]
    """Views of the run, shown what runs from now on; dsv3.tracking.rebuild shows them what is in results/."""

    track_fp8_operands: bool
    """Show trackers what FP8 does to each operand of each module; false: to the whole model. results/ has both."""

    aim_repo: str | None
    """Aim repository: a folder or aim://host:port; null: .aim at the root of the DVC repository."""

    experiment: str | None
    """Aim experiment under which runs are filed; null: the model configuration's name."""

    def device_type(self, has_cuda: bool) -> Device:
        """Return what `device` means on a machine that has a CUDA device, or has none."""
        if self.device == "auto":
            return "cuda" if has_cuda else "cpu"
        return self.device

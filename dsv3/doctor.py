"""Says in a line each whether this machine and this checkout can run the pipeline: `python -m dsv3.doctor`.

What keeps several checks from being made (a mistake in params.yaml, a package that is missing) is reported once.

Every check is a function without arguments that returns a `Finding`; one that fails names its remedy. Heavy imports
stand inside the checks, so that a broken package is a finding and not the end of the examination.
"""

import fcntl
import importlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dsv3.artifacts import write_text
from dsv3.cli import command
from dsv3.errors import UserError, one_line
from dsv3.params.architecture import read_architecture
from dsv3.params.pipeline import read_outputs
from dsv3.params.read import Params, read_params, schema_text
from dsv3.params.runtime import TrackerName
from dsv3.sizing.machines import has_nvidia_driver
from dsv3.sizing.memory import GIB, training_memory, without_moments

PARAMS = Path("params.yaml")
SCHEMA = Path("docs/params.schema.json")


@dataclass(frozen=True)
class Finding:
    """What a check found; `remedy` says what to do where it is not ok."""

    subject: str
    is_ok: bool
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        """Return the line that is printed."""
        line = f"{'ok' if self.is_ok else '!!'}  {self.subject:11} {self.message}"
        return line if self.is_ok else f"{line}; {self.remedy}"


def check_python() -> Finding:
    """Check that torch has wheels for this Python."""
    is_ok = (3, 11) <= sys.version_info[:2] < (3, 15)
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", is_ok, f"{version} in {sys.prefix}", "use Python 3.11 to 3.14; Aim needs 3.11 or 3.12")


def check_path() -> Finding:
    """Check that the `dvc` on the PATH is this environment's: DVC starts stages, and its queue DVC, by bare names."""
    found, expected = shutil.which("dvc"), Path(sys.executable).parent / "dvc"
    is_ok = found is not None and Path(found).absolute() == expected.absolute()
    return Finding("path", is_ok, f"dvc is {found or 'not found'}", f"run: source {expected.parent / 'activate'}")


def check_repository() -> Finding:
    """Check that Git and DVC know this folder, and report how many files differ from the last commit."""
    status = git("status", "--porcelain")
    if "dubious ownership" in status.stderr:
        trust = f"run: git config --global --add safe.directory {shlex.quote(str(Path.cwd()))}"
        return Finding("repository", False, "belongs to another user, so Git and DVC refuse it", trust)
    has_dvc, commit = Path(".dvc").is_dir(), "git add -A && git commit -m start"
    if status.returncode:
        remedy = f"run: git init && {'' if has_dvc else 'dvc init && '}{commit}, or clone the project"
        return Finding("repository", False, "not a Git repository", remedy)
    if not has_dvc:
        return Finding("repository", False, "no .dvc here", "go to the project's root, or run: dvc init")
    if git("rev-parse", "--verify", "HEAD").returncode:
        message = "has no commit, with which experiments are compared"
        return Finding("repository", False, message, f"run: {commit}")
    num_changed = len(status.stdout.splitlines())
    changes = (
        f"{num_changed} files differ from the last commit" if num_changed else "nothing differs from the last commit"
    )
    return Finding("repository", True, changes)


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Return how `git` answers, in English."""
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, env=environment)


def check_outputs() -> Finding:
    """Check that no link leads an output of the pipeline to another disk, where DVC takes none."""
    from dsv3.training.plan import check_unlinked

    outputs = pipeline_outputs()
    for path in outputs:
        check_unlinked(path)
    return Finding("outputs", True, f"{len(outputs)} outputs in the project's own folders")


def pipeline_outputs() -> list[Path]:
    """Return what the stages of dvc.yaml write."""
    return [path for paths in read_outputs(Path("dvc.yaml")).values() for path in paths]


def check_home() -> Finding:
    """Check that libraries can keep what they load and compile in their folders, most of them below HOME."""
    caches = {"HF_HOME": f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/huggingface"}
    if has_nvidia_driver():
        caches["TRITON_CACHE_DIR"] = "~/.triton/cache"
    folders = {name: Path(os.environ.get(name, default)).expanduser() for name, default in caches.items()}
    refused = {name: folder for name, folder in folders.items() if not can_be_written(folder)}
    if not refused:
        return Finding("home", True, f"{', '.join(map(str, folders.values()))} can be written")
    message = f"{', '.join(map(str, refused.values()))} can't be written, where libraries keep what they load"
    settings = " ".join(f"{name}=/tmp/{name.lower()}" for name in refused)
    return Finding("home", False, message, f"run: export {settings}")


def can_be_written(folder: Path) -> bool:
    """Return whether `folder` can be written, or made where it isn't there."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def check_params() -> Finding:
    """Check params.yaml as every stage does."""
    params = read_params(PARAMS)
    return Finding("parameters", True, f"{PARAMS} is valid, model {params.model.config}")


def check_schema() -> Finding:
    """Check that the schema that editors read is the one that the code defines."""
    is_ok = SCHEMA.is_file() and SCHEMA.read_bytes() == schema_text().encode()
    message = f"{SCHEMA} is {'current' if is_ok else 'out of date'}"
    return Finding("schema", is_ok, message, "run: python -m dsv3.doctor --write-schema")


def check_aim() -> Finding:
    """Check that Aim can be imported where it is asked for; report where runs go and whether its interface is up."""
    from dsv3.tracking.identity import aim_folder

    runtime = read_params(PARAMS).runtime
    if "aim" not in runtime.trackers:
        return Finding("aim", True, "not among runtime.trackers")
    if importlib.util.find_spec("aim") is None and sys.version_info >= (3, 13):
        remedy = "set runtime.trackers to [tensorboard], or use Python 3.12"
        return Finding("aim", False, "has no wheels for Python 3.13 and later", remedy)
    importlib.import_module("aim")
    version = importlib.metadata.version("aim")
    repository = aim_folder(runtime.aim_repo)
    if repository is None:
        return Finding("aim", True, f"{version}, runs go to {runtime.aim_repo} (not contacted)")
    if not repository.is_dir():
        return Finding("aim", True, f"{version}, {repository} will be made by the first run")
    is_writable = os.access(repository, os.W_OK)
    is_up = is_locked(repository / "meta" / "index" / "LOCK")
    message = f"{version}, {repository}{', its interface is up' if is_up else ''}"
    return Finding("aim", is_writable, message, "it can't be written: set runtime.aim_repo to a folder of yours")


def check_trackers() -> Finding:
    """Check that the other trackers that params.yaml names can be imported: a training goes on without them."""
    from dsv3.tracking.tracker import remedy

    names: list[TrackerName] = [name for name in read_params(PARAMS).runtime.trackers if name != "aim"]
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, which W&B itself leaves, is no package
            return Finding("trackers", False, f"{name} is not installed, so it will show no run", remedy(name))
    message = f"{', '.join(names)} can be imported" if names else "none beside aim among runtime.trackers"
    return Finding("trackers", True, message)


def check_views() -> Finding:
    """Report which of the chosen trackers don't show the results that are checked out: DVC starts no stage for that."""
    from dsv3.tracking.shown import missing_views, rebuilding

    params = read_params(PARAMS)
    names = missing_views(Path("results"), params)
    if not names:
        return Finding("views", True, "no tracker lacks the results that are checked out")
    message = f"{', '.join(names)} {'does' if len(names) == 1 else 'do'} not show the results that are checked out"
    return Finding("views", False, message, f"run: {rebuilding(names)}")


def is_locked(path: Path) -> bool:
    """Return whether another process holds the lock file at `path`, as `aim up` holds its index."""
    if not path.is_file():
        return False
    with path.open("rb+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def check_torch() -> Finding:
    """Check that the device that params.yaml asks for is there, and report what it multiplies natively."""
    import torch

    from dsv3.devices import device_name, multiplies_bf16, multiplies_fp8, torch_device

    device = torch_device(read_params(PARAMS).runtime)
    name = device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    bf16 = "native" if multiplies_bf16(device) else "emulated"
    fp8 = "native" if multiplies_fp8(device) else "emulated"
    return Finding("torch", True, f"{torch.__version__} on {name}; bf16 {bf16}, fp8 {fp8}")


def check_driver() -> Finding:
    """Check that a machine with an NVIDIA driver has a torch that uses it."""
    import torch

    has_driver, has_cuda = has_nvidia_driver(), torch.cuda.is_available()
    message = "an NVIDIA driver" if has_driver else "no NVIDIA driver"
    is_ok = has_cuda or not has_driver
    remedy = f"torch {torch.__version__} does not use it: remove .venv and run: make setup"
    return Finding("driver", is_ok, message, remedy)


def check_experts() -> Finding:
    """Check that the expert backend that params.yaml names runs here, and list those that do."""
    from dsv3.devices import torch_device
    from dsv3.training.precision import register_training_experts, resolved_precision, training_backends

    params = read_params(PARAMS)
    train, architecture = params.train, read_architecture(Path(params.model.config))
    device = torch_device(params.runtime)
    chosen = register_training_experts(train, architecture, device)
    usable = training_backends(train, architecture, device)
    asked = f"{resolved_precision(train.precision, device)}{' with fp8' if train.use_fp8 else ''} on {device.type}"
    return Finding("experts", True, f"{chosen}; for {asked} there are {', '.join(usable)}")


def check_memory() -> Finding:
    """Check that the training's estimated peak is less than the device's memory (a CPU's: than a container's limit)."""
    from dsv3.devices import torch_device, total_bytes

    params = read_params(PARAMS)
    device = torch_device(params.runtime)
    device_type = params.runtime.device_type(has_cuda=device.type == "cuda")
    architecture = read_architecture(Path(params.model.config))
    memory = training_memory(architecture, params.train, device_type)
    if device_type == "cuda" and params.runtime.cpu_offload == "optimizer":
        memory = without_moments(memory, architecture, params.train)
    needed, available = memory.peak_bytes, total_bytes(device)
    message = f"training needs about {needed / GIB:.2f} GiB of {available / GIB:.0f} GiB ({device_type})"
    remedy = "lower train.per_device_train_batch_size, or set train.gradient_checkpointing to true"
    return Finding("memory", needed < available, message, remedy)


def check_disk() -> Finding:
    """Check that the checkpoints and the export fit the disk, with a gibibyte to spare."""
    params = read_params(PARAMS)
    needed = disk_bytes(params)
    free = shutil.disk_usage(".").free
    message = f"{free / GIB:.0f} GiB free, checkpoints and export take {needed / GIB:.2f} GiB"
    remedy = "free some, or lower runtime.save_total_limit"
    return Finding("disk", free > needed + GIB, message, remedy)


def disk_bytes(params: Params) -> int:
    """Return the size of `save_total_limit` checkpoints, the one that is being written, and the exported weights.

    With `load_best_model_at_end` the best weights too, twice: older ones go once a checkpoint names their successor.
    """
    memory = training_memory(read_architecture(Path(params.model.config)), params.train, "cpu")
    checkpoint = memory.weights_bytes + memory.optimizer_states_bytes
    copies = 3 if params.train.load_best_model_at_end else 1
    return (params.runtime.save_total_limit + 1) * checkpoint + copies * memory.weights_bytes


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_path,
    check_repository,
    check_outputs,
    check_home,
    check_params,
    check_schema,
    check_driver,
    check_torch,
    check_experts,
    check_memory,
    check_disk,
    check_aim,
    check_trackers,
    check_views,
)


def finding(check: Callable[[], Finding]) -> Finding:
    """Return what `check` found; a mistake of the user's or a package that can't be imported is a finding too."""
    subject = check.__name__.removeprefix("check_")
    try:
        return check()
    except UserError as error:
        message = one_line(error)
        return Finding(
            subject, False, message, "correct params.yaml" if message.startswith(str(PARAMS)) else "correct it"
        )
    except (ImportError, OSError) as error:
        return Finding(subject, False, f"{type(error).__name__}: {error}", "install the dependencies: make setup")


def main(
    write_schema: Annotated[
        bool, typer.Option("--write-schema", help=f"Write {SCHEMA} from the code, and nothing else.")
    ] = False,
) -> None:
    """Check this machine and this checkout, a line each; exit with status 1 if something is wrong."""
    if write_schema:
        write_text(SCHEMA, schema_text())
        return
    reported: set[str] = set()
    prevented: list[str] = []
    for found in map(finding, CHECKS):
        if not found.is_ok and found.message in reported:
            prevented.append(found.subject)
            continue
        typer.echo(str(found))
        reported |= set() if found.is_ok else {found.message}
    if prevented:
        typer.echo(f"--  {', '.join(prevented)}: not checked, for a reason above")
    if reported:
        raise typer.Exit(1)


if __name__ == "__main__":
    command(main)

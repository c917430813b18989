"""What a user is promised about faults, asked by the command line alone, so that any commit can be asked.

CLONE=/path/of/a/clone python -m pytest -n 0 tests/stress/promises.py

The clone brings its code and, in `.venv`, its packages; without CLONE it is this one. The suite has the same promises
nearer to the code, and faster; these tell a commit that keeps them from one that does not. Each test has a training of
seconds or starts from its end, in a copy of its own; all of them take about eight minutes. Full disks need root.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from ruamel.yaml import YAML
from safetensors.numpy import load_file, save_file

from tests.committed import ROOT
from tests.training_inputs import MICRO, WORDS

CLONE = Path(os.environ.get("CLONE", str(ROOT))).absolute()
BIN = CLONE / ".venv/bin"
CORPUS, TOKENS, SIZES = "data/corpus", "data/tokens", "results/estimate_size/metrics.json"
MODEL, TRAINING = "outputs/final_model", "results/train"
WEIGHTS = f"{MODEL}/model.safetensors"
ARGUMENTS = {
    "download": f"--output {CORPUS}",
    "tokenize": f"--corpus {CORPUS} --output {TOKENS} --metrics results/tokenize/metrics.json",
    "estimate_size": "--output results/estimate_size",
    "train": f"--tokens {TOKENS} --corpus {CORPUS} --sizes {SIZES} --model {MODEL} --results {TRAINING}",
    "evaluate": f"--model {MODEL} --tokens {TOKENS} --run {TRAINING}/run.json --output results/evaluate",
    "sample": f"--model {MODEL} --run {TRAINING}/run.json --output results/sample/samples.md",
}
PARAMS = {
    "model.config": "micro.json",
    "data.source": "file",
    "data.path": "text.txt",
    "tokenize.vocab_size": 272,
    "train.max_steps": 40,
    "train.block_size": 32,
    "train.per_device_train_batch_size": 2,
    "train.eval_steps": 20,
    "evaluate.block_size": 32,
    "evaluate.stride": 16,
    "sample.max_new_tokens": 8,
    "runtime.save_steps": 5,
    "runtime.logging_steps": 5,
    "runtime.trackers": [],
}
END_S = 120.0
"""Longest that a command may take."""
AGE_S = 90 * 86400
"""Of a training that nobody goes on with."""
PROGRESS = re.compile(r"(train|evaluate|sample|step \d+|runs  )\b.*|\s*")
"""Lines of a training that goes on, which are no errors."""
HOSTILE = ["lear | fool", "lear <script>alert(1)<b>"]


@dataclass(frozen=True)
class Answer:
    """What a command said, and how it ended."""

    status: int
    out: str
    err: str

    def is_line(self, *words: str) -> None:
        """A command that fails says why in few lines, with these words, and none of them is Python's."""
        assert self.status not in {0, -signal.SIGKILL}
        assert "Traceback" not in self.out + self.err
        lines = [line for line in self.err.splitlines() if not PROGRESS.fullmatch(line)]
        assert len(lines) <= 3, self.err
        assert all(word in lines[-1] for word in words), self.err


@dataclass(frozen=True)
class Lab:
    """A copy of the clone with a small text and model."""

    root: Path

    def set(self, **values: Any) -> None:
        """Set parameters: `section__key=value`."""
        yaml, path = YAML(), self.root / "params.yaml"
        params = yaml.load(path)
        for name, value in values.items():
            section, key = name.split("__")
            params[section][key] = value
        yaml.dump(params, path)

    def architecture(self, **values: Any) -> None:
        """Write the architecture, with other values."""
        fields = {**MICRO, "num_nextn_predict_layers": 0, **values}
        (self.root / "micro.json").write_text(json.dumps(fields))

    def start(self, stage: str, *more: str, **variables: str) -> subprocess.Popen[str]:
        """Start a stage in an environment that holds little."""
        environment = {
            "PATH": f"{BIN}:/usr/bin:/bin",
            "HOME": os.environ["HOME"],
            "OMP_NUM_THREADS": "1",
            "DVC_NO_ANALYTICS": "1",
            **variables,
        }
        command = [str(BIN / "python"), "-m", f"stages.{stage}", *ARGUMENTS[stage].split(), *more]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.root, env=environment, text=True, stdout=pipe, stderr=pipe, start_new_session=True
        )

    def run(self, stage: str, *more: str, **variables: str) -> Answer:
        """Run a stage to its end."""
        return ended(self.start(stage, *more, **variables))

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        found = [path.parent for path in (self.root / ".checkpoints").glob("*/step_*/complete")]
        return sorted(found, key=lambda path: int(path.name.split("_")[1]))

    def kill_after(self, number: int) -> None:
        """Start a training and kill it when it has that many checkpoints."""
        training = self.start("train")
        wait_until(lambda: len(self.checkpoints()) >= number or training.poll() is not None)
        assert training.poll() is None
        training.kill()
        training.communicate()

    def weights(self) -> bytes:
        """The exported weights."""
        return (self.root / WEIGHTS).read_bytes()


def ended(process: subprocess.Popen[str], timeout_s: float = END_S) -> Answer:
    """What the process said, at its end; one that does not end within the bound fails the test."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail(f"still runs after {timeout_s:.0f} s")
    print(out, err, f"status {process.returncode}", sep="\n")
    return Answer(process.returncode, out, err)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for it, within the bound."""
    end = time.monotonic() + END_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def largest(files: Iterator[Path]) -> Path:
    """The largest of the files."""
    return max(filter(Path.is_file, files), key=lambda path: path.stat().st_size)


def flip(path: Path, place: int) -> None:
    """Flip a bit of a byte."""
    content = bytearray(path.read_bytes())
    content[place] ^= 64
    path.write_bytes(content)


def change_json(path: Path, **values: Any) -> None:
    """Set fields of an object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shown(page: str) -> list[str]:
    """What a reader of a Markdown page sees, piece by piece; HTML in it fails the test."""
    blocks = MarkdownIt("commonmark").enable("table").parse(page)
    assert not [token.content for token in blocks if token.type == "html_block"]
    pieces = [token.children or [] for token in blocks if token.type == "inline"]
    assert not [token.content for piece in pieces for token in piece if token.type == "html_inline"]
    return ["".join(token.content for token in piece) for piece in pieces]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the clone in which all stages have run."""
    lab = Lab(tmp_path_factory.mktemp("finished") / "lab")
    subprocess.run(["git", "clone", "--quiet", str(CLONE), str(lab.root)], check=True)
    lab.architecture()
    draw = random.Random(1)
    (lab.root / "text.txt").write_text("\n".join(" ".join(draw.choices(WORDS, k=8)) for _ in range(600)))
    lab.set(**{name.replace(".", "__"): value for name, value in PARAMS.items()})
    for stage in ARGUMENTS:
        assert lab.run(stage).status == 0
    return lab.root


@pytest.fixture
def lab(finished: Path, tmp_path: Path) -> Lab:
    """All stages have run."""
    return Lab(shutil.copytree(finished, tmp_path / "lab", symlinks=True))


@pytest.fixture
def untrained(lab: Lab) -> Lab:
    """What comes before the training has run."""
    for folder in (".checkpoints", "outputs", TRAINING, "results/evaluate"):
        shutil.rmtree(lab.root / folder)
    return lab


@pytest.fixture
def weights(finished: Path) -> bytes:
    """What the training gives undisturbed."""
    return Lab(finished).weights()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    if os.geteuid():
        pytest.skip("only root mounts a disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


# 1: a partly random model is not scored


@pytest.mark.parametrize("stage", ["evaluate", "sample"])
def test_a_model_without_a_tensor_is_refused(lab: Lab, stage: str):
    tensors = load_file(lab.root / WEIGHTS)
    lacking = "model.layers.1.self_attn.o_proj.weight"
    del tensors[lacking]
    save_file(tensors, lab.root / WEIGHTS, metadata={"format": "pt"})
    lab.run(stage).is_line(MODEL, lacking)


def test_a_model_that_lacks_a_layer_of_its_config_is_refused(lab: Lab):
    change_json(lab.root / MODEL / "config.json", num_hidden_layers=3)
    lab.run("evaluate").is_line(MODEL, "model.layers.2.")


# 2: damage of checkpoints is noticed


@pytest.mark.parametrize("name", ["model", "optim"])
def test_a_flipped_bit_in_a_checkpoint_changes_no_weights(untrained: Lab, weights: bytes, name: str):
    untrained.kill_after(2)
    file = largest(untrained.checkpoints()[-1].rglob(f"*{name}*"))
    flip(file, file.stat().st_size * 3 // 4)
    assert untrained.run("train").status == 0
    assert untrained.weights() == weights


# 3: token data are what they were


def test_a_flipped_bit_in_a_token_shard_is_refused(untrained: Lab):
    shard = largest((untrained.root / TOKENS).glob("train*"))
    flip(shard, -100)
    untrained.run("train").is_line(shard.name)


def test_token_data_whose_description_is_empty_are_refused(untrained: Lab):
    (untrained.root / TOKENS / "meta.json").write_text("{}")
    untrained.run("train").is_line("meta.json", "vocab_size")


# 4: no NaN is exported


@pytest.mark.parametrize("max_steps", [1, 40])
def test_weights_that_are_not_numbers_are_not_exported(untrained: Lab, max_steps: int):
    untrained.set(train__adam_epsilon=1e-46, train__optim="adamw", train__warmup_ratio=0.0)
    untrained.set(train__max_steps=max_steps, train__eval_steps=1)
    untrained.run("train").is_line("adam_epsilon")  # refused before it can do harm; the suite has NaN in the weights
    assert not (untrained.root / WEIGHTS).exists()


# 5: nonsense is refused, or told


@pytest.mark.parametrize(
    "values",
    [{"learning_rate": True}, {"weight_decay": 1e308}, {"per_device_train_batch_size": 100_000}],
    ids=str,
)
def test_nonsense_in_the_parameters_is_refused(untrained: Lab, values: dict[str, Any]):
    untrained.set(**{f"train__{name}": value for name, value in values.items()})
    untrained.run("train", "--dry-run").is_line("params.yaml", *values)


def test_validations_that_never_come_are_told(untrained: Lab):
    untrained.set(train__eval_steps=100_000)
    answer = untrained.run("train", "--dry-run")
    assert "train.eval_steps is 100000" in answer.out + answer.err


@pytest.mark.parametrize(
    "values",
    [
        {"n_routed_expert": 8},
        {"hidden_size": 32.0},
        {"hidden_size": "32"},
        {"rms_norm_eps": -1},
        {"scoring_func": "softmax"},
        {"topk_method": "greedy"},
        {"moe_layer_freq": 2},
        {"num_nextn_predict_layers": 40},
    ],
    ids=str,
)
def test_nonsense_in_the_architecture_is_refused(untrained: Lab, values: dict[str, Any]):
    untrained.architecture(**values)
    untrained.run("train", "--dry-run").is_line("micro.json", *values)


# 6: somebody's folder stays


def test_a_folder_of_somebodys_stays(untrained: Lab):
    novel = untrained.root / "mine" / "novel.txt"
    novel.parent.mkdir()
    novel.write_text("mine")
    untrained.run("download", "--output", "mine").is_line("mine", "novel.txt")
    assert novel.exists()


def test_a_folder_with_other_outputs_stays(untrained: Lab):
    untrained.run("download", "--output", "data").is_line("data")
    assert (untrained.root / TOKENS / "meta.json").exists()


# 7: a tracker that dies stops nothing


@pytest.fixture
def aim_server(untrained: Lab) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Aim's server: its address, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    repo, home = untrained.root / "remote", untrained.root / "home"
    repo.mkdir()
    home.mkdir()
    environment = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(home)}
    aim, quiet = str(BIN / "aim"), subprocess.DEVNULL
    subprocess.run([aim, "init", "--repo", str(repo)], env=environment, check=True, stdout=quiet, stderr=quiet)
    command = [aim, "server", "--repo", str(repo), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens)
    time.sleep(5)  # it listens before it answers
    yield f"aim://127.0.0.1:{port}", server
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_a_tracker_that_dies_costs_neither_the_model_nor_the_end(
    untrained: Lab, aim_server: tuple[str, subprocess.Popen[bytes]]
):
    address, server = aim_server
    untrained.set(runtime__trackers=["aim"], runtime__aim_repo=address, train__max_steps=400)
    training = untrained.start("train")
    wait_until(lambda: bool(untrained.checkpoints()) or training.poll() is not None)
    os.killpg(server.pid, signal.SIGKILL)
    assert ended(training, 150.0).status == 0
    assert (untrained.root / WEIGHTS).exists()


# 8: what a shell was left with changes nothing


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_TORCH_DEVICE", "nowhere"),
        ("WORLD_SIZE", "2"),
    ],
)
def test_a_variable_of_the_launchers_is_refused_or_changes_nothing(
    untrained: Lab, weights: bytes, name: str, value: str
):
    answer = untrained.run("train", **{name: value})
    if answer.status:
        answer.is_line("environment", name.removeprefix("WORLD_"))  # what a launcher sets is told of together
    else:
        assert untrained.weights() == weights


# 9: what would fail after the training is said before it, or does not fail


def test_a_home_that_cannot_be_written_fails_before_the_training_or_not_at_all(untrained: Lab):
    training = untrained.run("train", HOME="/proc/none")
    if training.status:
        training.is_line("/proc/none")
    else:
        assert [untrained.run(stage, HOME="/proc/none").status for stage in ("evaluate", "sample")] == [0, 0]


def test_outputs_that_are_a_link_are_told(lab: Lab, tmp_path: Path):
    shutil.move(lab.root / "outputs", tmp_path / "elsewhere")
    (lab.root / "outputs").symlink_to(tmp_path / "elsewhere")
    doctor = [str(BIN / "python"), "-m", "dsv3.doctor"]
    environment = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": os.environ["HOME"]}
    told = subprocess.run(doctor, cwd=lab.root, env=environment, capture_output=True, text=True, check=False)
    assert "outputs" in lab.run("train", "--dry-run").err or re.search(r"outputs\b.*\blink", told.stdout + told.stderr)


# 10: an older checkpoint serves


def cut(newest: Path) -> None:
    file = largest(newest.rglob("*"))
    file.write_bytes(file.read_bytes()[:-1])


def empty(newest: Path) -> None:
    largest(newest.rglob("*optim*")).write_bytes(b"")


def no_state(newest: Path) -> None:
    (newest / "trainer_state.json").write_text("{}")


def foreign(newest: Path) -> None:
    for name in ("step_abc", "step_8 (copy)", "step_999"):
        (newest.parent / name).mkdir()
        (newest.parent / name / "complete").touch()


@pytest.mark.parametrize("damage", [cut, empty, no_state, foreign])
def test_a_training_goes_on_beside_a_damaged_checkpoint(untrained: Lab, weights: bytes, damage: Callable[[Path], None]):
    untrained.kill_after(2)
    damage(untrained.checkpoints()[-1])
    assert untrained.run("train").status == 0
    assert untrained.weights() == weights


# 11: a full disk is a line


@pytest.mark.parametrize(
    ("stage", "option"), [("download", "--output"), ("tokenize", "--output"), ("train", "--model")]
)
def test_a_full_disk_is_told_in_a_line(untrained: Lab, small_disk: Path, stage: str, option: str):
    (small_disk / "ballast").write_bytes(bytes(252 << 10))
    untrained.run(stage, option, str(small_disk / "made")).is_line("full", "free", "made")


def test_a_full_disk_of_aims_stops_nothing(untrained: Lab, small_disk: Path):
    (small_disk / "ballast").write_bytes(bytes(200 << 10))
    untrained.set(runtime__trackers=["aim"], runtime__aim_repo=str(small_disk / "aim"))
    answer = untrained.run("train")
    assert answer.status == 0
    assert "Traceback" not in answer.err


# 12: a lock that nobody holds keeps nobody out


@pytest.mark.parametrize("content", [b"", b"garbage", b"1\n", b"-1", b"99999999999999999999"])
def test_an_odd_lock_keeps_nobody_out(untrained: Lab, weights: bytes, content: bytes):
    untrained.kill_after(1)
    locks = [path for path in (untrained.root / ".checkpoints").rglob("*lock*") if path.is_file()]
    for path in locks:
        path.write_bytes(content)
    assert locks
    assert untrained.run("train").status == 0
    assert untrained.weights() == weights


# 13: a finished training is not lost


def test_a_finished_training_whose_outputs_are_gone_is_exported_again(lab: Lab, weights: bytes):
    for folder in ("outputs", TRAINING):
        shutil.rmtree(lab.root / folder)
    lab.set(runtime__resume="must")
    assert lab.run("train").status == 0
    assert lab.weights() == weights


# 14: what is left behind goes


def test_the_checkpoints_of_a_training_that_never_went_on_are_removed(untrained: Lab):
    untrained.kill_after(1)
    left, then = untrained.checkpoints()[-1].parent, time.time() - AGE_S
    for path in (*left.rglob("*"), left):
        os.utime(path, (then, then))
    untrained.set(train__learning_rate=1e-3)
    assert untrained.run("train").status == 0
    assert not left.exists()


# 15: a terminal that goes, and files of another kind


def test_a_training_whose_terminal_goes_saves(untrained: Lab):
    untrained.set(runtime__save_steps=1000, train__max_steps=2000)
    training, history = untrained.start("train"), untrained.root / TRAINING / "history.tsv"
    wait_until(lambda: history.exists() and history.read_text().count("\n") > 3)
    training.send_signal(signal.SIGHUP)
    ended(training)
    assert untrained.checkpoints()


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_parameters_in_another_encoding_are_refused(untrained: Lab, encoding: str):
    path = untrained.root / "params.yaml"
    path.write_bytes((path.read_text() + "# é\n").encode(encoding))
    untrained.run("train", "--dry-run").is_line("params.yaml", "UTF-8")


def test_parameters_with_a_nul_are_refused(untrained: Lab):
    path = untrained.root / "params.yaml"
    path.write_text(path.read_text().replace("seed", "s\0eed", 1))
    untrained.run("train", "--dry-run").is_line("params.yaml", "NUL")


def test_a_table_with_a_byte_order_mark_is_read(untrained: Lab):
    (untrained.root / "table.csv").write_bytes(b"\xef\xbb\xbftext,n\nthe king is dead,1\nlong live the king,2\n")
    untrained.set(data__path="table.csv")
    assert untrained.run("download").status == 0


def test_a_link_that_leaves_the_data_is_told(untrained: Lab):
    folder = untrained.root / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("the king\n" * 50)
    (folder / "b.txt").symlink_to("/etc/hostname")
    untrained.set(data__path="folder")
    answer = untrained.run("download")
    assert "b.txt" in answer.out + answer.err


# 16: too little memory is said before


def test_a_model_that_memory_cannot_hold_is_told_before_it_is_trained(untrained: Lab):
    shutil.copy(untrained.root / "mini_model/config.json", untrained.root / "micro.json")
    answer = untrained.run("train", "--dry-run")
    assert re.search(r"needs [\d.,]+ GiB.* free", answer.out + answer.err)


# 17: nobody's code is run


@pytest.mark.parametrize("with_digests", [True, False])
def test_code_in_a_models_folder_is_not_run(lab: Lab, with_digests: bool):
    ran, files = lab.root / "ran", list((lab.root / MODEL).glob("*.py"))
    assert files
    if not with_digests:
        (lab.root / MODEL / "SHA256SUMS").unlink(missing_ok=True)
    for path in files:
        code = path.read_text().replace("from __future__ import annotations", "")
        path.write_text(f"open({str(ran)!r}, 'w').close()\n{code}")
    for answer in (lab.run("evaluate"), lab.run("sample")):
        if answer.status:
            answer.is_line(".py")
    assert not ran.exists()


def test_a_model_whose_code_is_said_to_be_elsewhere_asks_nobody(lab: Lab):
    config = lab.root / MODEL / "config.json"
    classes = json.loads(config.read_text())["auto_map"]
    change_json(config, auto_map={name: f"somebody/else--{where}" for name, where in classes.items()})
    lab.run("evaluate").is_line("config.json", "auto_map")


# 18: names are text


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("place", ["experiment", "architecture", "run"])
def test_a_name_is_text_in_every_page(untrained: Lab, place: str, name: str):
    variables = {}
    if place == "experiment":
        untrained.set(runtime__experiment=name)
    elif place == "architecture":
        (untrained.root / "micro.json").rename(untrained.root / f"{name}.json")
        untrained.set(model__config=f"{name}.json")
    else:
        variables["DVC_EXP_NAME"] = name
    for stage in ("train", "evaluate", "sample"):
        answer = untrained.run(stage, **variables)
        if answer.status:  # a name that is refused does no harm
            answer.is_line(name)
            return
    pages = [untrained.root / "results/sample/samples.md", untrained.root / MODEL / "README.md"]
    texts = {page.name: page.read_text().split("\n---\n", maxsplit=1)[-1] for page in pages}
    for page, text in texts.items():
        pieces = shown(text)
        assert "lear" not in text or any(name in piece for piece in pieces), page

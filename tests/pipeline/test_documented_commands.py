"""Every command that README and docs name is run, in a small laboratory, as it stands there or by a stand-in.

A command is a line of a shell block, or a span of code that begins with the name of a program. What is run, and how,
is said in the three tables below; a command that none of them names runs as it stands, so that a new one is tested, and
an entry that no page needs any more fails. Sizes are a laboratory's (a model of 37,000 parameters, three steps); all
else, DVC among it, is the real thing. docs/log.md and CHANGELOG.md tell of the past, and are left out.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.contracts.test_tree import TEXTS
from tests.pipeline.laboratory import Laboratory, verses
from tests.training_inputs import MICRO, ROOT
from tests.warm_python import WarmPython

pytestmark = pytest.mark.pipeline

PAGES = sorted(name for name in TEXTS if re.fullmatch(r"(README|CONTRIBUTING|SECURITY|docs/(?!log)\w+)\.md", name))
PROGRAMS = (
    r"[A-Z_]+=[^\s`]+ \w+|accelerate|apt-get|cat|cp|curl|docker|dvc|export|git|gto|jupyter|llama-cli|lm_eval|make|pip|"
    "pre-commit|pytest|python|source|tensorboard|torchrun|trackio|transformers|unset|uv"
)
TIMEOUT_S = 600
"""For a hang: a section of ten experiments takes two minutes on an idle machine, and more than four on a busy one."""
NOTEBOOK = "docs/comparison.ipynb"

SMALL = "-S train.max_steps=2 -S train.block_size=48 -S evaluate.block_size=48 -S evaluate.stride=48"
STAND_INS = {
    # a page's words for what is each reader's own
    "<address>": ("$SERVER", "the reader's Git server; here a bare repository"),
    "<branch>": ("main", "the reader's branch"),
    "<name>": ("sample", "the reader's stage"),
    "/mnt/shared/dsv3": ("$STORAGE", "the reader's folder; here a temporary one"),
    # what the laboratory must have first
    "git commit -am": ("git commit --allow-empty --quiet -am", "the laboratory's results are committed already"),
    "git clone <address> dsv3-lab && cd dsv3-lab": ("true", "the laboratory is the clone"),
    "&& cd dsv3-lab && make setup": (
        "dsv3-lab && cp -a $LAB/.venv dsv3-lab/ && cd dsv3-lab && make setup",
        "packages come from an index; this environment stands for the one that make setup fills",
    ),
    "dvc exp push origin fp8": (
        "dvc exp run --temp -n fp8 -S train.use_fp8=true && dvc exp push origin fp8",
        "README's experiment has to be there",
    ),
    "train.init_from=outputs/another_model": (
        "train.init_from=another_model",
        "the reader's model; here a copy of the laboratory's, since outputs/ is DVC's",
    ),
    "tokenize.tokenizer=folder": ("tokenize.tokenizer=another_model", "the reader's tokenizer"),
    # trainings of minutes, and more processes than this machine has cores
    "flags tiny -S train.max_steps=100": (f"flags tiny {SMALL}", "a preset sets its own sizes"),
    "flags tiny ": (f"flags tiny {SMALL} ", "a preset sets its own sizes"),
    "flags tiny_minimal": (f"flags tiny_minimal {SMALL}", "a preset sets its own sizes"),
    "dvc exp run -S train.max_steps=100": (f"dvc exp run {SMALL}", "a preset sets its own sizes"),
    "flags h100_80gb": (
        f"flags h100_80gb {SMALL} -S train.per_device_train_batch_size=2 -S runtime.device=cpu",
        "a GPU's; here its values on a CPU, with sizes of its own",
    ),
    "runtime.num_processes=4 -S train.gradient_accumulation_steps=4": (
        "runtime.num_processes=2 -S train.gradient_accumulation_steps=2",
        "two processes show what four do",
    ),
    "dvc queue start -j 2": (
        "dvc queue start -j 2 && until ! dvc queue status | grep -E 'Queued|Running'; do sleep 1; done"
        " && dvc queue status && test $(dvc queue status | grep -c Success) = 2 && dvc queue stop",
        "it starts workers and returns; the test waits for them",
    ),
    "python -m benchmarks.train_step": (
        "python -m benchmarks.train_step --rounds 1 --batch 1 --block 16 --only ours",
        "minutes; one round of one contestant",
    ),
    "python -m benchmarks.study run precision": ("python -m benchmarks.study", "eighteen trainings"),
    "python -m benchmarks.study run regularization": ("echo", "twenty-five trainings"),
    "python -m benchmarks.study run distillation": ("echo", "twenty trainings, five of them of twenty epochs"),
    "make ablations": ("make --dry-run ablations", "trainings of hours"),
    "make scaling": ("make --dry-run scaling", "trainings of hours"),
    "tokenize.vocab_size=1024": ("tokenize.vocab_size=270", "the laboratory's model has 272 words"),
    "xargs -r dvc exp run -n quality": ("xargs -r -n 2 echo", "the preset's sizes are not the laboratory's"),
    "python -m dsv3.export fp8 --power-of-two-scales": (
        "python -m dsv3.export fp8 --power-of-two-scales outputs/final_model outputs/final_model_fp8",
        "named without its folders",
    ),
    "python -m dsv3.doctor": (
        "PATH=$ENVIRONMENT:$PATH python -m dsv3.doctor",
        "it looks for the dvc beside its Python, which the warm one has elsewhere",
    ),
    # servers and browsers
    "python -m dsv3.tracking.rebuild": (
        "python -m dsv3.tracking.rebuild --tracker aim",
        "the laboratory has no trackers, which take a second in every stage; tests/pipeline/test_pipeline.py has",
    ),
    "make ui": ("python -m dsv3.tracking.views --no-serve", "a server; tests/browser starts it, and looks at it"),
    "tensorboard --logdir runs": (
        "python -m dsv3.tracking.rebuild --tracker tensorboard && tensorboard --inspect --logdir runs",
        "a server; --inspect reads the same files",
    ),
    "TRACKIO_DIR=.trackio trackio show --project dsv3-lab": (
        "true",
        "a server, of a package of its own; tests/dsv3/tracking/test_trackio.py reads what it would show",
    ),
    "transformers serve outputs/final_model --port 8000 &": (
        "true",
        "a server, with packages of its own; the question to it below says what was seen",
    ),
    "--interactive": ("--max-new-tokens 4 --interactive < /dev/null", "nobody types here"),
    "--max-new-tokens 200": ("--max-new-tokens 4", "sizes"),
    "--max-new-tokens 100": ("--max-new-tokens 4", "sizes"),
    "max_steps=20": ("max_steps=1", "sizes"),
    # the Hub
    "dvc exp run -S data.source=hub -S data.hub_id=roneneldan/TinyStories": (
        "! dvc exp run -S data.source=hub -S data.hub_id=roneneldan/TinyStories 2>&1 | tee said >&2"
        " && grep -q '^data.hub_id is roneneldan/TinyStories; it can.t be read' said",
        "no network: it says so in one line; tests/dsv3/data/test_sources.py reads a data set that it makes up",
    ),
    # tests that run tests
    "python -m pytest tests/dsv3/params": (
        "python -m pytest --collect-only tests/dsv3/params",
        "the suite runs it; here are other parameters than the project's",
    ),
    "python -m pytest -k resume": (
        "python -m pytest -k resume --collect-only tests/dsv3/training",
        "minutes; the suite runs them anyway",
    ),
}
"""Text that is replaced in any command: by what, and why."""

NOT_RUN = {
    "make repro": "minutes, and it installs packages: .ci/run does it in a fresh clone; `dvc repro` runs here",
    "make test": "this test is a part of it",
    "make check": ".ci/run runs it",
    "make check test": ".ci/run runs it",
    "make test-ui": ".ci/run runs it",
    "make soak": ".ci/run runs it",
    "make soak MINUTES=30": "half an hour; .ci/run runs two minutes",
    "python -m tests.stress.proof NAME": "minutes to an hour each; tests/stress runs their parts",
    "python -m tests.stress.proof sharded-kills": "minutes; tests/stages/test_train_sharded.py kills one",
    "python -m tests.stress.sharding": "an hour; tests/dsv3/training/test_sharding.py samples it",
    "make audit": "needs the package index",
    "make bench": "minutes of timing on a quiet machine; tests/benchmarks runs its parts",
    "pytest -m gpu": "needs a GPU",
    "python -m pytest -m gpu": "needs a GPU",
    "python -m benchmarks.fp8": "minutes of timing; on docs/gpu.md it needs a GPU",
    "python -m benchmarks.fp8_errors": "minutes; tests/benchmarks/test_fp8_errors.py runs its parts",
    "python -m benchmarks.study report precision": "reads eighteen trainings; tests/benchmarks makes up their results",
    "python -m benchmarks.study report regularization": "reads as many trainings; tests/benchmarks makes them up",
    "python -m benchmarks.study report distillation": "reads as many trainings; tests/benchmarks makes them up",
    "pip install uv": "needs the package index",
    "uv pip compile --universal --python-version 3.11 --group pipeline --group dev --group ui --group wandb"
    " --group trackio --no-annotate --output-file constraints.txt": (
        "needs the package index; tests/contracts/test_dependencies.py compares"
    ),
    "dvc remote modify storage endpointurl http://127.0.0.1:9000": "needs a bucket; tests/pipeline/test_s3.py has one",
    "pip install peft": "needs the package index",
    "pip install lm-eval": "needs the package index",
    'pip install -c constraints.txt "transformers[serving]"': "needs the package index",
    'curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d \''
    '{"model": "outputs/final_model", "prompt": "ROMEO:", "max_tokens": 50}\'': "needs the server; done by hand",
    'llama-cli --model model.gguf --prompt "ROMEO:" --predict 100 --no-conversation': (
        "needs llama.cpp; tests/oracle/test_gguf.py computes what it computes, and runs it where it is"
    ),
    "lm_eval --model hf --model_args pretrained=outputs/final_model,trust_remote_code=True,max_length=256"
    " --include_path configs/lm_eval --tasks local_text": (
        "a package of its own; tests/oracle/test_lm_eval.py runs it where it is"
    ),
    "pip install dvc-s3": "needs the package index",
    "pip install -c constraints.txt tensorboard": "needs the package index",
    "pip install -c constraints.txt trackio": "needs the package index",
    "pip install -c constraints.txt wandb": "needs the package index",
    "dvc commit": "named, not given: it waits for an answer",
    "dvc exp apply": "named, not given: docs/sharing.md has it whole",
}
"""Commands that are not run, by how they begin up to their end, and why."""

SHOWN = {"docs/coming_from_train_py.md": "its tables' first column has the old scripts' commands"}
"""Pages with commands that are not this project's, and which."""


def sequences(page: str) -> list[list[str]]:
    """The page's commands, in the order that they are run in: all of its shell blocks, then those of each line."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", TEXTS[page], flags=re.DOTALL)
    first = [line for block in blocks for line in block.splitlines() if line.strip()]
    prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    lines = [re.sub(r"^\|[^|]*\|", "", line) if page in SHOWN else line for line in prose.splitlines()]
    spans = [re.findall(rf"`((?:{PROGRAMS}) [^`]+)`", line) for line in lines]
    return [each for each in [first, *spans] if each]


def command(text: str) -> str:
    """A command as a shell takes it: without the comment, and without Markdown's escape of a column's border."""
    return re.sub(r"\s+#.*", "", text).replace(r"\|", "|").strip()


def stand_in(text: str) -> str:
    """What is run for a command."""
    known = "|".join(map(re.escape, sorted(STAND_INS, key=len, reverse=True)))
    return re.sub(known, lambda found: STAND_INS[found[0]][0], text)


def programs(page: str) -> list[str]:
    """The page's blocks of Python, each as the command that runs it."""
    blocks = re.findall(r"```python\n(.*?)```", TEXTS[page], flags=re.DOTALL)
    return [f"python -c {shlex.quote(block)}" for block in blocks]


def notebook() -> str:
    """The notebook's cells as one program: a line of a shell becomes a call, and what is run for it a stand-in."""
    cells = json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    lines = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    call = "subprocess.run({!r}, shell=True, check=True)"
    program = re.sub(r"^!(.*)$", lambda found: call.format(stand_in(found[1])), lines, flags=re.MULTILINE)
    program = program.replace("sys.executable", 'os.environ["WARM"]')  # or what it calls would be cold
    return f"python -c {shlex.quote(program)}"


def scripts() -> dict[str, list[str]]:
    """What is run, by a name: each sequence once, without those that only repeat what another one runs."""
    found: dict[str, list[str]] = {}
    found[NOTEBOOK] = [notebook()]
    done: set[str] = set()
    for page in sorted(PAGES, key=lambda name: not re.search(r"```(bash|sh|console)", TEXTS[name])):
        for number, block in enumerate(programs(page)):
            found[f"{page}-python-{number}"] = [block]
        for number, texts in enumerate(sequences(page)):
            commands = [each for each in map(command, texts) if each not in NOT_RUN]
            if not set(commands) <= done:
                found[f"{page}-{number}: {commands[-1][:60]}"] = commands
                done |= set(commands)
    return found


SCRIPTS = scripts()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    lab = Laboratory(tmp_path_factory.mktemp("warm"))
    warm = WarmPython(lab.root / "python", {**lab.environment(), "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    yield warm
    warm.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, warm: WarmPython) -> Path:
    """A laboratory whose pipeline has run, with a model of the reader's, texts, an environment, and a Git server."""
    lab = Laboratory.at(tmp_path_factory.mktemp("template"))
    small = {**MICRO, "num_nextn_predict_layers": 0, "max_position_embeddings": 512}
    for name, vocab_size in {"config_nano.json": 272, "config_tiny.json": 32000, "config.json": 32000}.items():
        (lab.root / "mini_model" / name).write_text(json.dumps({**small, "vocab_size": vocab_size}, indent=2))
    words = " ".join(f"{number * 7919 % 100003:x}" for number in range(3000))
    (lab.root / "verses.txt").write_text(verses(700) + words)
    lab.set_params({"train": {"max_steps": 3, "eval_steps": 3}, "sample": {"max_new_tokens": 4}})
    (lab.root / "my_texts").mkdir()
    (lab.root / "my_texts/mine.txt").write_text(verses(900))
    environment = lab.root / ".venv"
    shutil.copytree(warm.programs, environment / "bin")
    (environment / "bin/activate").write_text(f"export PATH={environment}/bin:$PATH\n")
    for stamp in (".pipeline", ".dev", ".ui"):
        (environment / stamp).touch()
    lab.run("env", f"PATH={warm.programs}:{lab.environment()['PATH']}", "dvc", "repro")
    shutil.copytree(lab.root / "outputs/final_model", lab.root / "another_model")
    lab.set_params({"runtime": {"trackers": []}})
    lab.commit("A baseline")
    return lab.root


@pytest.fixture(scope="module")
def runs(
    template: Path, warm: WarmPython, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, "Future[str]"]]:
    """What each script that was asked for says of its failure, or nothing; two run at a time."""
    asked = {item.callspec.params.get("name") for item in request.session.items if getattr(item, "callspec", None)}
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(failure, template, tmp_path_factory.mktemp("reader"), warm, commands)
            for name, commands in SCRIPTS.items()
            if name in asked
        }
        pool.shutdown(cancel_futures=True)


def failure(template: Path, folder: Path, warm: WarmPython, commands: list[str]) -> str:
    """Run commands one after the other, in one shell and a laboratory of their own; return what failed."""
    lab, server = Laboratory(folder / "lab"), folder / "server.git"
    shutil.copytree(template, lab.root, symlinks=True)
    environment = lab.environment() | {"SERVER": str(server), "STORAGE": str(folder / "storage"), "LAB": str(lab.root)}
    environment["WARM"] = str(warm.programs / "python")
    environment["ENVIRONMENT"] = str(Path(sys.executable).parent)
    environment["PATH"] = f"{warm.programs}:{environment['PATH']}"
    lines = ["set -eo pipefail", "git clone --quiet --bare . $SERVER", "git remote add origin $SERVER"]
    lines += ["git push --quiet --set-upstream origin main"]
    lines += [line for each in commands for line in (f"echo '+' {shlex.quote(each)} >&2", stand_in(each))]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=lab.root,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    shutil.rmtree(folder)
    return f"status {done.returncode}\n{done.stdout}\n{done.stderr}" if done.returncode else ""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_documents_commands_run(name: str, runs: dict[str, "Future[str]"]):
    for package in re.findall(r"\bfrom (peft)\b", "\n".join(SCRIPTS[name])):
        pytest.importorskip(package, reason=f"not among the dependencies: pip install {package}")
    failed = runs[name].result()
    assert not failed, failed


def test_what_is_said_of_commands_is_said_of_commands_that_a_page_has():
    """And pages with commands are found: an empty list would prove nothing."""
    known = [command(text) for page in PAGES for each in sequences(page) for text in each]
    known += [each for page in PAGES for each in programs(page)]
    assert [old for old in STAND_INS if not any(old in each for each in known)] == []
    assert [each for each in NOT_RUN if each not in known] == []
    assert {"make ui", "dvc push", "dvc exp run -S seed=42"} <= set(known)

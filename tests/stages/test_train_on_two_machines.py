"""The train stage on two machines, made of network namespaces: torch's own agents find each other by address."""

import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.stress.processes import wait_until
from tests.training_inputs import ROOT, environment, stage_command, trained_folder, write_inputs

ADDRESSES = ("10.213.7.1", "10.213.7.2")
TRAIN = {"gradient_accumulation_steps": 4, "optim": "muon"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def cable_of(machine: str) -> str:
    return f"v{machine[4:]}"


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Yield the names of two network namespaces that a cable connects."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"dsv3{uuid.uuid4().hex[:6]}" for _ in ADDRESSES]
    cables = [cable_of(name) for name in names]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def agent_command(folder: Path, machine: str, address: str, options: Sequence[str]) -> list[str]:
    """Return the command that starts a machine's agent with two processes of the train stage."""
    agent = ["-m", "torch.distributed.run", *options, "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    agent += ["--rdzv_endpoint", f"{ADDRESSES[0]}:29511", "--rdzv_id", machine[:4], "--local_addr", address]
    # Which machine the endpoint is, torch asks the host's name, which the two share.
    agent += ["--rdzv_conf", f"is_host={str(address == ADDRESSES[0]).lower()},last_call_timeout=1"]
    return ["ip", "netns", "exec", machine, sys.executable, *agent, *stage_command(folder)[1:]]


def start_agents(
    folder: Path, machines: list[str], options: Sequence[str] = ("--nnodes", "2"), **variables: str
) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            agent_command(folder, machine, address, options),
            cwd=ROOT,
            env=environment(folder) | {"GLOO_SOCKET_IFNAME": cable_of(machine)} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for machine, address in zip(machines, ADDRESSES, strict=True)
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_folder(tmp_path_factory.mktemp("alone"), train=TRAIN)


def workers_of(agent: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the processes of the train stage that `agent` has started."""
    children = psutil.Process(agent.pid).children(recursive=True)
    return [child for child in children if "RANK" in child.environ()]


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def assert_same_training(together: Path, alone: Path) -> None:
    expected = load_file(alone / "final_model" / "model.safetensors")
    for name, weight in load_file(together / "final_model" / "model.safetensors").items():
        assert (weight - expected[name]).norm() < 1e-5 * expected[name].norm(), name
    # Every token of every step went to the same expert.
    assert (together / "results" / "router.tsv").read_bytes() == (alone / "results" / "router.tsv").read_bytes()


def test_two_machines_of_two_processes_train_what_one_process_does(tmp_path, machines, alone):
    write_inputs(tmp_path, train=TRAIN, runtime={"sharding": "hybrid"})
    agents = start_agents(tmp_path, machines)
    ends = [agent.communicate(timeout=200) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ends
    assert_same_training(tmp_path, alone)


def test_a_cut_cable_ends_every_process_with_a_line_within_a_minute_and_the_training_goes_on(tmp_path, machines, alone):
    write_inputs(tmp_path, train=TRAIN, runtime={"sharding": "hybrid", "save_steps": 1})
    agents = start_agents(tmp_path, machines)
    assert wait_until(lambda: list(tmp_path.glob(".checkpoints/*/step_*/complete")))
    workers = [worker for agent in agents for worker in workers_of(agent)]
    assert len(workers) == 4
    ip("-n", machines[0], "link", "set", cable_of(machines[0]), "down")
    # torch's agent on the far side waits for the store for minutes, and leaves its ended workers as zombies.
    assert wait_until(lambda: all(has_ended(worker) for worker in workers), 60.0)
    for agent in agents:
        agent.kill()
    errors = [agent.communicate()[1] for agent in agents]
    for text in errors:
        assert text.count("; dvc repro goes on from the last checkpoint\n") == 2, text
        assert "stages/train.py" not in text  # no traceback of ours; torch's agents print theirs
    ip("-n", machines[0], "link", "set", cable_of(machines[0]), "up")
    write_inputs(tmp_path, train=TRAIN, runtime={"sharding": "hybrid", "resume": "must"})
    agents = start_agents(tmp_path, machines)
    ends = [agent.communicate(timeout=200) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ends
    assert_same_training(tmp_path, alone)


def test_a_training_that_loses_a_machine_goes_on_by_itself_over_the_other_with_the_same_batches(
    tmp_path, machines, alone
):
    write_inputs(tmp_path, train=TRAIN, runtime={"sharding": "full", "save_steps": 1})
    elastic = ["--nnodes", "1:2", "--max_restarts", "3"]
    first, second = start_agents(tmp_path, machines, elastic, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert wait_until(lambda: list(tmp_path.glob(".checkpoints/*/step_*/complete")))
    for process in [*workers_of(second), second]:
        process.kill()
    second.communicate()
    output, errors = first.communicate(timeout=200)
    assert first.returncode == 0, errors
    assert re.search(r"resuming \S+step_\d+, whole", output + errors), errors
    assert_same_training(tmp_path, alone)

"""The train stage on two machines, made of network namespaces: torch's own agents find each other by address."""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training_inputs import ROOT, environment, run_stage, stage_command, write_inputs

ADDRESSES = ("10.213.7.1", "10.213.7.2")
TRAIN = {"gradient_accumulation_steps": 4, "optim": "muon"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Yield the names of two network namespaces that a cable connects."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"dsv3{uuid.uuid4().hex[:6]}" for _ in ADDRESSES]
    cables = [f"v{name[4:]}" for name in names]
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


def agent_command(folder: Path, machine: str, address: str) -> list[str]:
    """Return the command that starts a machine's agent with two processes of the train stage."""
    agent = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    agent += ["--rdzv_endpoint", f"{ADDRESSES[0]}:29511", "--rdzv_id", machine[:4], "--local_addr", address]
    # Which machine the endpoint is, torch asks the host's name, which the two share.
    agent += ["--rdzv_conf", f"is_host={str(address == ADDRESSES[0]).lower()}"]
    return ["ip", "netns", "exec", machine, sys.executable, *agent, *stage_command(folder)[1:]]


def test_two_machines_of_two_processes_train_what_one_process_does(tmp_path, machines):
    alone, together = tmp_path / "alone", tmp_path / "together"
    write_inputs(alone, train=TRAIN)
    done = run_stage(alone)
    assert done.returncode == 0, done.stderr
    write_inputs(together, train=TRAIN, runtime={"sharding": "hybrid"})
    agents = [
        subprocess.Popen(
            agent_command(together, machine, address),
            cwd=ROOT,
            env=environment(together) | {"GLOO_SOCKET_IFNAME": f"v{machine[4:]}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for machine, address in zip(machines, ADDRESSES, strict=True)
    ]
    ends = [agent.communicate(timeout=200) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ends
    expected = load_file(alone / "final_model" / "model.safetensors")
    for name, weight in load_file(together / "final_model" / "model.safetensors").items():
        assert (weight - expected[name]).norm() < 1e-5 * expected[name].norm(), name
    # Every token of every step went to the same expert.
    assert (together / "results" / "router.tsv").read_bytes() == (alone / "results" / "router.tsv").read_bytes()

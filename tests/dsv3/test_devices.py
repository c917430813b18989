import psutil
import pytest
import torch

from dsv3 import devices
from dsv3.devices import device_name, free_bytes, torch_device
from dsv3.errors import UserError
from tests.committed import DEFAULTS

RUNTIME = DEFAULTS.runtime


def runtime(device: str):
    return RUNTIME.model_copy(update={"device": device})


@pytest.mark.parametrize(
    ("asked", "with_cuda", "without"), [("auto", "cuda", "cpu"), ("cpu", "cpu", "cpu"), ("cuda", "cuda", "cuda")]
)
def test_a_device_means_the_same_to_whoever_asks(asked, with_cuda, without):
    assert runtime(asked).device_type(has_cuda=True) == with_cuda
    assert runtime(asked).device_type(has_cuda=False) == without


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_without_a_gpu_the_cpu_is_used(monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch_device(runtime(asked)) == torch.device("cpu")
    assert device_name(torch.device("cpu")) == "cpu"


def test_a_gpu_is_used_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_device(runtime("auto")) == torch.device("cuda")


def test_a_gpu_that_is_asked_for_and_missing_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match=r"runtime\.device is cuda; this machine has no CUDA device; set it to auto or cpu"
    ):
        torch_device(runtime("cuda"))


@pytest.mark.parametrize(
    ("limit", "used", "left"), [("1000", "400", 600), ("max", "400", None), (None, None, None), ("1000", "", None)]
)
def test_a_container_leaves_what_its_limit_leaves(tmp_path, limit, used, left):
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
    assert devices._container_bytes(tmp_path) == (float("inf") if left is None else left)


def test_the_free_memory_of_a_cpu_is_what_the_system_has_or_what_a_container_leaves(monkeypatch):
    monkeypatch.setattr(devices, "_container_bytes", lambda _: float("inf"))
    assert 0 < free_bytes(torch.device("cpu")) < psutil.virtual_memory().total
    monkeypatch.setattr(devices, "_container_bytes", lambda _: 5)
    assert free_bytes(torch.device("cpu")) == 5

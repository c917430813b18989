import itertools

import pytest

from dsv3.params.architecture import read_architecture
from dsv3.sizing import machines
from dsv3.sizing.machines import LADDER, MACHINES, Machine, best_fit, fits, has_nvidia_driver, most_sequences
from dsv3.sizing.memory import GIB
from tests.committed import DEFAULTS, PROJECT

TRAIN = DEFAULTS.train
ARCHITECTURES = {path.name: read_architecture(path) for path in (PROJECT / "mini_model").glob("config*.json")}
H100 = next(machine for machine in MACHINES if machine.name.startswith("H100"))


@pytest.mark.parametrize("config", sorted(ARCHITECTURES))
def test_more_memory_never_fits_less(config):
    for device in ("cpu", "cuda"):
        sizes = sorted(machine.usable_bytes for machine in MACHINES if machine.device == device)
        fitting = [Machine("", device, usable / GIB, usable_share=1.0) for usable in sizes]
        most = [most_sequences(ARCHITECTURES[config], TRAIN, machine) for machine in fitting]
        assert all(fewer <= more for fewer, more in itertools.pairwise(most))


def test_the_largest_number_that_fits_fits_and_its_double_does_not():
    tiny = ARCHITECTURES["config_tiny.json"]
    train = TRAIN.model_copy(update={"block_size": 4096})
    largest = most_sequences(tiny, train, H100)
    assert largest > 0
    assert fits(tiny, train.model_copy(update={"per_device_train_batch_size": largest}), H100)
    assert not fits(tiny, train.model_copy(update={"per_device_train_batch_size": 2 * largest}), H100)


def test_mini_trains_on_an_h100_with_frugal_settings_and_not_at_all_on_a_consumers_card():
    """With fp32 moments its states alone are 84.8 GiB, more than the card (reference: 16 bytes per parameter)."""
    mini = ARCHITECTURES["config.json"]
    fit = best_fit(mini, TRAIN, 4096, H100)
    assert fit is not None
    assert fit.settings == LADDER[-1][0]
    assert best_fit(mini, TRAIN, 4096, Machine("RTX 4090", "cuda", 24.0)) is None


def test_a_driver_is_known_by_its_program(monkeypatch):
    monkeypatch.setattr(machines.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert has_nvidia_driver()
    monkeypatch.setattr(machines.shutil, "which", lambda name: None)
    assert not has_nvidia_driver()

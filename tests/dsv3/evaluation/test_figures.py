import numpy as np
import pytest
from PIL import Image

from dsv3.evaluation.figures import expert_load, loss_by_position, save_figure


def test_the_same_numbers_give_the_same_bytes_without_date_or_version(tmp_path):
    losses = np.linspace(5, 3, 40)
    save_figure(loss_by_position(losses, 3.2, "Loss"), tmp_path / "a.png")
    save_figure(loss_by_position(losses, 3.2, "Loss"), tmp_path / "b.png")
    save_figure(loss_by_position(losses + 0.5, 3.2, "Loss"), tmp_path / "c.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert not {"Software", "Creation Time"} & set(image.info)


@pytest.mark.parametrize("length", [1, 2, 3, 256])
def test_the_loss_curve_spans_the_window(length):
    axes = loss_by_position(np.ones(length), 1.0, "Loss").axes[0]
    assert axes.lines[0].get_xdata()[-1] == length
    assert "nats" in axes.get_ylabel()


def test_the_heat_map_shows_load_relative_to_an_even_share():
    axes = expert_load({1: np.array([10.0, 30.0]), 2: np.array([5.0, 5.0])}, "Load").axes[0]
    assert axes.images[0].get_array().tolist() == [[0.5, 1.5], [1.0, 1.0]]
    assert [text.get_text() for text in axes.texts] == ["0.50", "1.50", "1.00", "1.00"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"]


def test_many_experts_are_drawn_without_numbers():
    assert not expert_load({1: np.ones(64)}, "Load").axes[0].texts

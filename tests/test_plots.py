"""Pictures, and that nobody who does not ask for them needs matplotlib (nor any other extra)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.image import imread
from support import numbered_images

from cryolike_data import ImageDescriptor
from cryolike_data.errors import ArgumentError, CryolikeDataError, MissingDependencyError
from cryolike_data.plots import montage, plot_stack

GRID = ImageDescriptor.from_individual_values(8, 2.0, n_inplanes=8)
PICTURES = ["particles_fourier_stack_000007.png", "particles_phys_stack_000007.png", "power_spectrum_stack_000007.png"]


def stack(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and transforms of the shapes that go with ``GRID``; noise both."""
    generator = torch.Generator().manual_seed(3)
    fourier = torch.randn(n, GRID.polar_grid.n_shells, 8, dtype=torch.complex64, generator=generator)
    return torch.from_numpy(numbered_images(n, 8)), fourier


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plots") / "made" / "as_needed"
    plot_stack(*stack(3), GRID, folder, 7)
    return folder


def test_a_stack_has_three_pictures(pictures):
    assert sorted(path.name for path in pictures.iterdir()) == PICTURES


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_not_blank(pictures, name):
    pixels = imread(pictures / name)[..., :3]
    assert (pixels != pixels[0, 0]).any(axis=-1).mean() > 0.01


def test_a_stack_of_one_image_is_drawn(tmp_path):
    plot_stack(*stack(1), GRID, tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == PICTURES


def test_a_stack_of_constant_images_is_drawn_without_a_warning(tmp_path):
    phys, fourier = stack(2)
    plot_stack(torch.zeros_like(phys), torch.zeros_like(fourier), GRID, tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == PICTURES


def test_a_montage_shows_each_image_in_its_own_panel():
    images = torch.from_numpy(numbered_images(5, 8))
    figure = montage(images, columns=3)
    assert isinstance(figure, Figure)
    shown = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    np.testing.assert_array_equal(shown, images.numpy())


def test_a_montage_puts_the_first_row_of_pixels_at_the_bottom():
    figure = montage(torch.from_numpy(numbered_images(1, 8)))
    assert figure.axes[0].images[0].origin == "lower"


def test_a_montage_has_the_columns_asked_for():
    figure = montage(torch.from_numpy(numbered_images(5, 8)), columns=2)
    assert len({round(axis.get_position().x0, 3) for axis in figure.axes}) == 2


def test_a_montage_carries_its_titles():
    figure = montage(torch.from_numpy(numbered_images(2, 8)), titles=["one", "two"])
    assert [axis.get_title() for axis in figure.axes] == ["one", "two"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float16, torch.float64])
def test_a_montage_takes_any_pixel_type(dtype):
    assert len(montage(torch.arange(32).reshape(2, 4, 4).to(dtype)).axes) == 2


def test_a_montage_takes_what_a_model_has_made():
    made = torch.from_numpy(numbered_images(2, 8)).float().requires_grad_() * 2
    shown = [np.asarray(axis.images[0].get_array()) for axis in montage(made).figure.axes]
    np.testing.assert_array_equal(shown, made.detach().numpy())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_pixel_that_is_not_finite_leaves_the_grey_of_the_others(value):
    images = torch.from_numpy(numbered_images(2, 8)).float()
    images[1] = images[0]
    images[0, 0, 0] = value
    broken, whole = (axis.images[0].get_clim() for axis in montage(images).axes)
    np.testing.assert_allclose(broken, whole, atol=0.05 * float(images[1].max() - images[1].min()))


def test_an_image_without_a_finite_pixel_is_drawn_without_a_warning(tmp_path):
    montage(torch.full((1, 8, 8), np.nan)).savefig(tmp_path / "nothing.png")


def test_a_montage_of_nothing_is_refused():
    with pytest.raises(CryolikeDataError, match="image"):
        montage(torch.zeros(0, 8, 8))


def test_titles_that_do_not_fit_the_images_are_refused():
    with pytest.raises(CryolikeDataError, match="titles"):
        montage(torch.zeros(2, 8, 8), titles=["one"])


def test_drawing_leaves_no_figure_with_pyplot(tmp_path):
    # A figure that pyplot knows stays in memory for ever.
    before = pyplot.get_fignums()
    plot_stack(*stack(1), GRID, tmp_path, 7)
    montage(torch.from_numpy(numbered_images(2, 8)))
    assert pyplot.get_fignums() == before


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"cryolike-data\[plot\]"):
        montage(torch.zeros(2, 8, 8))


def test_importing_the_package_imports_no_extras():
    code = "import cryolike_data, cryolike_data.cli, cryolike_data.plots, sys, json; print(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"matplotlib", "finufft", "lz4", "yaml"} & set(json.loads(ran.stdout)) == set()


@pytest.mark.parametrize("wrong", [np.zeros((2, 8, 8)), torch.zeros(8, 8)], ids=["array", "one image"])
def test_a_montage_of_something_else_is_refused(wrong):
    with pytest.raises(ArgumentError, match=r"an \(N, H, W\) tensor, such as batch\.images"):
        montage(wrong)

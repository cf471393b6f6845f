"""CryoLike's objects for a batch: what is passed to CryoLike is what CryoLike made itself, and fits the signatures it has."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from math import pi
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import centred, polar_images, stored_images

from cryolike_data import Downsample, ImageDescriptor, IndexedDataset, ParticleBatch, stream
from cryolike_data.columns import Columns
from cryolike_data.cryolike_objects import cryolike_arguments, to_cryolike
from cryolike_data.errors import ArgumentError, MissingDependencyError, TableError
from cryolike_data.polar_batch import PolarBatch, PolarCollate

BOX, PIXEL_SIZE = 8, 1.5
DESCRIPTOR = ImageDescriptor.from_individual_values(BOX, PIXEL_SIZE, n_inplanes=6)
GRID = DESCRIPTOR.polar_grid
DOUBLE = replace(DESCRIPTOR, precision="double")


def random_batch(n: int = 3, precision: torch.dtype = torch.float32, **changes: Any) -> PolarBatch:
    """A batch that fits ``DESCRIPTOR``, with random numbers for transforms and CTF."""
    random = torch.Generator().manual_seed(n)
    shape = (n, GRID.n_shells, GRID.n_inplanes)
    fourier = torch.randn(shape, dtype=precision.to_complex(), generator=random)
    ctf = torch.rand(shape, dtype=precision, generator=random)
    columns = Columns({"index": torch.arange(n), "uid": torch.arange(n)})
    return replace(PolarBatch(torch.zeros(n, BOX, BOX), PIXEL_SIZE, columns, fourier=fourier, polar_ctf=ctf, grid=GRID), **changes)


def optics_columns(n: int, **values: Any) -> Columns:
    """The columns of ``n`` particles with optics, in float64."""
    optics = {f"ctf/{name}": torch.as_tensor(np.broadcast_to(value, n).astype(np.float64)) for name, value in values.items()}
    return Columns({"index": torch.arange(n), "uid": torch.arange(n)} | optics)


# The signatures of CryoLike's constructors, and as much of what they do as shows in the tests.


class CartesianGrid2D:
    def __init__(self, n_pixels: Any, pixel_size: Any, endpoint: bool = False) -> None:
        self.n_pixels, self.pixel_size, self.endpoint = n_pixels, pixel_size, endpoint


class PolarGrid:
    def __init__(
        self,
        radius_max: float = -1.0,
        dist_radii: float = -1.0,
        uniform: bool = True,
        quadrature: Any = "Gauss-Jacobi, beta 1",
        n_inplanes: Any = None,
        dist_inplane: float = 1 / (2 * pi),
        half_space: bool = False,
    ) -> None:
        self.radius_max, self.dist_radii, self.n_inplanes = radius_max, dist_radii, n_inplanes
        self.uniform, self.quadrature, self.half_space = uniform, quadrature, half_space


@dataclass
class FourierImages:
    images_fourier: torch.Tensor
    polar_grid: PolarGrid


class Images:
    def __init__(self, phys_data: Any = None, fourier_data: Any = None, box_size: Any = None, viewing_angles: Any = None, ctf: Any = None):
        assert isinstance(phys_data, CartesianGrid2D)
        assert isinstance(fourier_data, FourierImages)
        self.phys_grid, self.box_size, self.viewing_angles, self.ctf = phys_data, box_size, viewing_angles, ctf
        self.images_fourier, self.polar_grid = fourier_data.images_fourier, fourier_data.polar_grid


class CTF:
    def __init__(
        self,
        ctf_descriptor: Any,
        polar_grid: Any = None,
        box_size: float = -1.0,
        anisotropy: bool = True,
        cs_corrected: bool = False,
        precision: Any = "double",
    ) -> None:
        assert isinstance(ctf_descriptor, torch.Tensor)
        self.ctf, self.anisotropy = ctf_descriptor, anisotropy


@pytest.fixture
def cryolike(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the package cryolike; its modules by name."""
    contents: dict[str, list[type]] = {
        "grids": [CartesianGrid2D, PolarGrid, FourierImages],
        "microscopy": [CTF],
        "stacks": [Images],
    }
    package = ModuleType("cryolike")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "cryolike", package)
    modules = {}
    for name, classes in contents.items():
        modules[name] = ModuleType(f"cryolike.{name}")
        vars(modules[name]).update({each.__name__: each for each in classes})
        monkeypatch.setitem(sys.modules, f"cryolike.{name}", modules[name])
    return SimpleNamespace(**modules)


@pytest.fixture
def likelihood_batch(likelihood_demo):
    """The particles of CryoLike's likelihood demo as a batch in double precision."""
    demo = likelihood_demo
    # CryoLike counts the angle of astigmatism from the first image axis (y) towards the second, and takes |U - V| for U - V.
    columns = optics_columns(
        len(demo["phys"]),
        voltage_kv=demo["voltage"],
        spherical_aberration_mm=demo["sphericalAberration"],
        amplitude_contrast=demo["amplitudeContrast"],
        defocus_u=np.maximum(demo["defocusU"], demo["defocusV"]),
        defocus_v=np.minimum(demo["defocusU"], demo["defocusV"]),
        astigmatism_angle_rad=pi / 2 - demo["defocusAngle"],
        phase_shift_rad=demo["phaseShift"],
    )
    raw = ParticleBatch(torch.from_numpy(demo["phys"]), float(demo["pixel_size"]), columns)
    grid = likelihood_descriptor().polar_grid
    return PolarCollate(grid, normalize="max", unit_power=True, dtype=torch.float64)(raw)


def likelihood_descriptor(precision: Any = "double") -> ImageDescriptor:
    return ImageDescriptor(48, 2.0, radius_max=9.0, dist_radii=0.25, n_inplanes=64, precision=precision)


def relative(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(found.numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.shared
@pytest.mark.parametrize(("precision", "tolerance"), [("double", 1e-11), ("single", 1e-6)])
def test_the_transforms_are_those_that_cryolike_made(likelihood_demo, likelihood_batch, precision, tolerance):
    given = cryolike_arguments(likelihood_batch, likelihood_descriptor(precision))
    assert relative(given.fourier, likelihood_demo["images_fourier"]) < tolerance


@pytest.mark.shared
@pytest.mark.parametrize(("precision", "tolerance"), [("double", 1e-7), ("single", 2e-7)])
def test_the_ctf_is_the_one_that_cryolike_made_with_its_axis_undone(likelihood_demo, likelihood_batch, precision, tolerance):
    given = cryolike_arguments(likelihood_batch, likelihood_descriptor(precision))
    assert relative(given.ctf, likelihood_demo["ctf"]) < tolerance  # physical constants of other years: 1e-8


@pytest.mark.shared
def test_the_grids_are_those_of_cryolike(likelihood_demo, likelihood_batch):
    given = cryolike_arguments(likelihood_batch, likelihood_descriptor())
    for name in ("radius_max", "dist_radii", "n_inplanes", "pixel_size"):
        assert getattr(given, name) == likelihood_demo[name], name
    assert given.n_pixels == likelihood_demo["phys"].shape[-1]


@pytest.mark.parametrize("of_batch", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("descriptor", "real", "complex_"), [(DESCRIPTOR, torch.float32, torch.complex64), (DOUBLE, torch.float64, torch.complex128)]
)
def test_tensors_are_those_of_the_batch_in_the_precision_of_the_descriptor(of_batch, descriptor, real, complex_):
    batch = random_batch(precision=of_batch)
    given = cryolike_arguments(batch, descriptor)
    assert torch.equal(given.fourier, batch.fourier.to(complex_))
    assert torch.equal(given.ctf, batch.polar_ctf.to(real))
    assert (given.fourier.dtype, given.ctf.dtype) == (complex_, real)


@pytest.mark.parametrize("descriptor", [DESCRIPTOR, DOUBLE])
def test_what_is_done_to_them_in_place_does_not_reach_the_batch(descriptor):
    batch = random_batch(precision=descriptor.complex_dtype.to_real())
    fourier, ctf = batch.fourier.clone(), batch.polar_ctf.clone()
    given = cryolike_arguments(batch, descriptor)
    given.fourier.zero_()
    given.ctf.zero_()
    assert torch.equal(batch.fourier, fourier)
    assert torch.equal(batch.polar_ctf, ctf)


def test_views_are_laid_out_anew():
    batch = random_batch()
    seen = replace(batch, fourier=batch.fourier.mT.contiguous().mT.conj(), polar_ctf=batch.polar_ctf.mT.contiguous().mT)
    given = cryolike_arguments(seen, DESCRIPTOR)
    assert given.fourier.is_contiguous()
    assert given.ctf.is_contiguous()
    assert not given.fourier.is_conj()
    assert torch.equal(given.fourier, batch.fourier.conj())
    assert torch.equal(given.ctf, batch.polar_ctf)


def test_gradients_end_here():
    batch = random_batch()
    given = cryolike_arguments(
        replace(batch, fourier=batch.fourier.requires_grad_(), polar_ctf=batch.polar_ctf.requires_grad_()), DESCRIPTOR
    )
    assert not given.fourier.requires_grad
    assert not given.ctf.requires_grad


def test_tensors_stay_on_the_device_of_the_batch():
    given = cryolike_arguments(random_batch().to("meta"), DESCRIPTOR)
    assert (given.fourier.device.type, given.ctf.device.type) == ("meta", "meta")


@pytest.mark.gpu
def test_tensors_of_a_batch_on_the_gpu_are_on_the_gpu():
    batch = random_batch()
    given = cryolike_arguments(batch.to("cuda"), DOUBLE)
    assert (given.fourier.device.type, given.ctf.device.type) == ("cuda", "cuda")
    assert torch.equal(given.fourier.cpu(), batch.fourier.to(torch.complex128))


DIFFERENT = {
    "radius_max": (replace(DESCRIPTOR, radius_max=1.9), "radius_max: 1.9 in the descriptor, 2.0 in the batch"),
    "dist_radii": (replace(DESCRIPTOR, dist_radii=0.3), "dist_radii: 0.3 in the descriptor, 0.25 in the batch"),
    "n_inplanes": (replace(DESCRIPTOR, n_inplanes=8), "n_inplanes: 8 in the descriptor, 6 in the batch"),
    "box": (replace(DESCRIPTOR, n_pixels=16), "box (pixels): 16 in the descriptor, 8 in the batch"),
    "pixel size": (replace(DESCRIPTOR, pixel_size=1.503), "pixel size (angstrom): 1.503 in the descriptor, 1.5 in the batch"),
}


@pytest.mark.parametrize(("descriptor", "told"), DIFFERENT.values(), ids=DIFFERENT)
def test_a_descriptor_that_differs_is_refused_and_only_the_difference_told(descriptor, told):
    with pytest.raises(ArgumentError) as caught:
        cryolike_arguments(random_batch(), descriptor)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert [line for line in lines if " in the descriptor, " in line] == [told]


def test_all_differences_are_told_at_once():
    other = ImageDescriptor(16, 3.0, radius_max=4.0, dist_radii=0.5, n_inplanes=12)
    with pytest.raises(ArgumentError) as caught:
        cryolike_arguments(random_batch(), other)
    assert str(caught.value).count(" in the descriptor, ") == 5
    assert "ImageDescriptor.from_individual_values(n_pixels=8, pixel_size=1.5)" in str(caught.value)


def test_a_grid_in_integers_equals_the_same_in_floats():
    given = cryolike_arguments(random_batch(), replace(DESCRIPTOR, radius_max=2))
    assert given.radius_max == 2.0


def test_pixel_sizes_may_differ_by_a_thousandth_and_the_descriptors_is_passed():
    given = cryolike_arguments(random_batch(pixel_size=PIXEL_SIZE * 1.0009), DESCRIPTOR)
    assert given.pixel_size == PIXEL_SIZE
    with pytest.raises(ArgumentError, match="pixel size"):
        cryolike_arguments(random_batch(pixel_size=PIXEL_SIZE * 1.0011), DESCRIPTOR)


def test_after_downsampling_the_descriptor_of_the_smaller_images_fits_and_that_of_the_larger_does_not():
    optics = {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "defocus_u": 1e4, "defocus_v": 9e3}
    columns = optics_columns(2, **optics, astigmatism_angle_rad=0.3)
    large = ParticleBatch(torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)), 0.75, columns)
    batch = PolarCollate(GRID, downsample=Downsample(box=BOX))(large)
    given = cryolike_arguments(batch, DESCRIPTOR)
    assert (given.n_pixels, given.pixel_size) == (BOX, PIXEL_SIZE)
    with pytest.raises(ArgumentError, match="after downsampling"):
        cryolike_arguments(batch, ImageDescriptor.from_individual_values(16, 0.75, n_inplanes=6))


def test_a_batch_without_ctf_is_refused_with_what_to_do():
    with pytest.raises(TableError, match="passthrough="):
        cryolike_arguments(random_batch(polar_ctf=None), DESCRIPTOR)


def test_a_complex_ctf_is_refused():
    batch = random_batch()
    with pytest.raises(ArgumentError, match=r"complex.*leave beam_tilt and trefoil out of ctf_terms"):
        cryolike_arguments(replace(batch, polar_ctf=batch.polar_ctf.to(torch.complex64)), DESCRIPTOR)


def test_a_batch_without_transforms_is_refused_with_what_to_do():
    batch = random_batch()
    plain = ParticleBatch(batch.images, batch.pixel_size, batch.columns)
    with pytest.raises(ArgumentError, match=r"polar=descriptor\.polar_grid"):
        cryolike_arguments(plain, DESCRIPTOR)


def test_a_batch_that_a_worker_left_unfinished_says_so():
    batch = random_batch()
    unfinished = ParticleBatch(batch.images, batch.pixel_size, batch.columns, pending=lambda _: batch)
    with pytest.raises(ArgumentError, match=r"call \.finish\(\)"):
        cryolike_arguments(unfinished, DESCRIPTOR)


def test_an_empty_batch_is_refused():
    with pytest.raises(ArgumentError, match="empty"):
        cryolike_arguments(random_batch(0), DESCRIPTOR)


def test_cryolike_is_called_with_these_arguments(cryolike):
    batch = random_batch()
    images, ctf = to_cryolike(batch, DESCRIPTOR)
    assert isinstance(images, cryolike.stacks.Images)
    assert isinstance(ctf, cryolike.microscopy.CTF)
    given = cryolike_arguments(batch, DESCRIPTOR)
    assert torch.equal(images.images_fourier, given.fourier)
    assert torch.equal(ctf.ctf, given.ctf)
    assert (images.phys_grid.n_pixels, images.phys_grid.pixel_size) == (BOX, PIXEL_SIZE)
    grid = images.polar_grid
    assert (grid.radius_max, grid.dist_radii, grid.n_inplanes, grid.uniform) == (2.0, 0.25, 6, True)


def test_what_would_change_the_meaning_is_left_at_cryolikes_defaults(cryolike):
    images, ctf = to_cryolike(random_batch(), DESCRIPTOR)
    assert (images.polar_grid.quadrature, images.polar_grid.half_space) == ("Gauss-Jacobi, beta 1", False)
    assert (images.phys_grid.endpoint, images.box_size, images.ctf) == (False, None, None)
    assert ctf.anisotropy is True


def test_a_stream_takes_the_place_of_the_stacks(cryolike, demo):
    dataset = IndexedDataset(demo.indexed)
    descriptor = ImageDescriptor.from_individual_values(dataset.box, dataset.pixel_size, n_inplanes=16)
    seen: dict[int, torch.Tensor] = {}
    for batch in stream(dataset, batch_size=16, shuffle=True, polar=descriptor.polar_grid, normalize="max", unit_power=True):
        images, ctf = to_cryolike(batch, descriptor)
        assert ctf.ctf.shape == images.images_fourier.shape
        seen |= dict(zip(batch.index.tolist(), images.images_fourier, strict=True))
    assert sorted(seen) == list(range(len(dataset)))
    expected = polar_images(centred(stored_images(demo.folder, np.load(demo.indexed))), dataset.box / 4, 16)
    assert relative(torch.stack([seen[row] for row in range(len(dataset))]), expected) < 2e-5


def test_without_cryolike_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryolike", None)
    with pytest.raises(MissingDependencyError, match=r"pip install git\+https://github\.com/flatironinstitute/CryoLike"):
        to_cryolike(random_batch(), DESCRIPTOR)


@pytest.mark.usefixtures("cryolike")
def test_a_cryolike_that_lacks_a_package_itself_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryolike.stacks", None)
    with pytest.raises(MissingDependencyError, match=r"cryolike\.stacks.*pip install matplotlib"):
        to_cryolike(random_batch(), DESCRIPTOR)


def test_the_arguments_need_no_cryolike(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryolike", None)
    assert cryolike_arguments(random_batch(), DESCRIPTOR).n_pixels == BOX

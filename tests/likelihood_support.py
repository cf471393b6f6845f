"""Images, templates and optics small enough for the brute-force likelihood, which gives the truth pose by pose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import likelihood_reference as reference
import numpy as np
import torch
from likelihood_reference import Complex, Real, Variant
from scipy.special import logsumexp

from cryolike_data import ParticleBatch
from cryolike_data.columns import Columns
from cryolike_data.ctf import Ctf, ctf_values, half_plane
from cryolike_data.demo import project_model
from cryolike_data.likelihood import Templates
from cryolike_data.polar_batch import PolarCollate
from cryolike_data.transforms import PolarGrid, to_polar_exact

PIXEL_SIZE = 2.0
#: (x, y), angstrom; no exchange or change of sign of the axes gives the same set
DISPLACEMENTS_A = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, -2.0], [3.0, 1.0], [-1.0, 2.5]])
Optics = dict[str, np.ndarray]


def optics(n: int, *, seed: int = 0, **columns: Any) -> Optics:
    """Fields of ``Ctf`` for n particles that differ in all of them; the larger defocus is U in some and V in others."""
    rng = np.random.default_rng([3, seed])
    usual = {
        "voltage_kv": np.where(np.arange(n) % 3 == 1, 200.0, 300.0),
        "spherical_aberration_mm": np.where(np.arange(n) % 3 == 1, 1.4, 2.7),
        "amplitude_contrast": rng.uniform(0.07, 0.12, n),
        "defocus_u": rng.uniform(6000, 10000, n),
        "defocus_v": rng.uniform(6000, 10000, n),
        "astigmatism_angle_rad": rng.uniform(-1.5, 1.5, n),
        "phase_shift_rad": rng.uniform(0, 0.5, n),
    }
    return {
        name: np.broadcast_to(np.asarray(value, np.float64), np.shape(usual.get(name, value))) for name, value in (usual | columns).items()
    }


def tensors(table: Optics) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(column)) for name, column in table.items()}


def particle_batch(images: np.ndarray, table: Optics, pixel_size: float = PIXEL_SIZE) -> ParticleBatch:
    rows = torch.arange(len(images))
    columns = {"index": rows, "uid": rows + 1000} | {f"ctf/{name}": column for name, column in tensors(table).items()}
    return ParticleBatch(torch.from_numpy(images), pixel_size, Columns(columns))


def blobs(box_A: float, seed: int = 0) -> dict[str, Any]:
    """A model for ``project_model`` without symmetry."""
    rng = np.random.default_rng([5, seed])
    return {"centres_A": rng.uniform(-0.2, 0.2, (8, 3)) * box_A, "amplitudes": rng.uniform(0.5, 1.5, 8), "sigma_A": 3.0}


def with_ctf(images: torch.Tensor, table: Optics, pixel_size: float = PIXEL_SIZE) -> torch.Tensor:
    """Images with the CTF of their rows."""
    transfer = ctf_values(Ctf(**tensors(table)), *half_plane(images.shape[-1], pixel_size))
    filtered: torch.Tensor = torch.fft.irfft2(torch.fft.rfft2(images.double()) * transfer, s=tuple(images.shape[-2:]))
    return filtered


@dataclass(frozen=True)
class Case:
    """Images of a model with noise, and projections of it as templates."""

    images: np.ndarray
    table: Optics
    templates: Templates

    @property
    def grid(self) -> PolarGrid:
        return self.templates.grid

    def batch(self, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
        """The ``PolarBatch`` of the images."""
        return PolarCollate(self.grid, dtype=dtype, **options)(particle_batch(self.images, self.table))

    def of_all_poses(self, displacements_A: np.ndarray = DISPLACEMENTS_A, *, variant: Variant = "exact", unit_power: bool = False) -> Real:
        """(B, S, displacements, rotations) log-likelihoods by brute force."""
        radii, angles, W = reference.polar_points(self.grid.radius_max, self.grid.dist_radii, self.grid.n_inplanes)
        transforms = reference.polar_transform(self.images, radii, angles)
        if unit_power:
            transforms = reference.unit_power(transforms, W)
        ctfs = true_ctf(self.table, self.grid, self.templates.box_A)
        x, y = reference.coordinates(radii, angles)
        at = (W, x, y, displacements_A[:, ::-1], self.templates.box_A, self.images[0].size)
        templates = self.templates.fourier.numpy()
        values = [
            [reference.pose_log_likelihood(image, template, ctf, *at, mask_term=variant) for template in templates]
            for image, ctf in zip(transforms, ctfs, strict=True)
        ]
        return np.array(values)


def case(
    box: int = 16, *, n_inplanes: int = 20, images: int = 3, templates: int = 4, seed: int = 0, reach: float = 1.0, **table: Any
) -> Case:
    """Images and templates of different poses, and a prior that is not uniform."""
    rng = np.random.default_rng([9, seed])
    model = blobs(box * PIXEL_SIZE, seed)
    shown = project_model(model, rng.normal(size=(images, 3)), rng.uniform(-2, 2, (images, 2)), box, PIXEL_SIZE).double().numpy()
    noisy = shown / shown.std() + rng.normal(size=shown.shape)
    rotvecs = rng.normal(size=(templates, 3))
    grid = PolarGrid.of_box(box, n_inplanes=n_inplanes, resolution_factor=reach)
    fourier = to_polar_exact(project_model(model, rotvecs, np.zeros((templates, 2)), box, PIXEL_SIZE).double(), grid)
    prior = torch.from_numpy(rng.dirichlet(np.ones(templates))).log()
    return Case(noisy, optics(images, seed=seed, **table), Templates(fourier, grid, box * PIXEL_SIZE, torch.from_numpy(rotvecs), prior))


def true_ctf(table: Optics, grid: PolarGrid, box_A: float) -> Complex | Real:
    """The CTF of each row on the grid, by the reference; complex if the table has beam tilt or trefoil."""
    names = {"defocus_u": "defocus_u_A", "defocus_v": "defocus_v_A", "astigmatism_angle_rad": "angle_rad"}
    values = []
    for row in range(len(table["defocus_u"])):
        of_row = {names.get(name, name): float(column[row]) for name, column in table.items() if column.ndim == 1}
        value = reference.ctf_true(grid.radii, grid.angles, box_A, **of_row)
        for name, fold in (("tilt_A", 1), ("trefoil_A", 3)):
            if name in table:
                wavelength = reference.electron_wavelength_A(of_row["voltage_kv"])
                from_x = np.pi / 2 - grid.angles
                harmonic = table[name][row, 0] * np.cos(fold * from_x) + table[name][row, 1] * np.sin(fold * from_x)
                value = value * np.exp(-2j * np.pi / fold * wavelength**2 * (2 * grid.radii[:, None] / box_A) ** 3 * harmonic)
        values.append(value)
    return np.array(values)


def background(grid: PolarGrid) -> torch.Tensor:
    """Transform of 1 over the box, as the likelihood takes it."""
    return torch.from_numpy(reference.background(*reference.coordinates(grid.radii, grid.angles)))


def by_template(values: Real) -> Real:
    """(B, S) means over displacements and rotations of what ``of_all_poses`` gives."""
    mean: Real = logsumexp(values, axis=(2, 3)) - np.log(values[0, 0].size)
    return mean


def integrated(values: Real, log_weights: Any) -> Real:
    """(B,) log-likelihoods of images from what ``of_all_poses`` gives."""
    total: Real = logsumexp(by_template(values) + np.asarray(log_weights), axis=1)
    return total


def best_pose(values: Real, log_weights: Any) -> tuple[np.ndarray, ...]:
    """Template, displacement and rotation (numbers) of the most likely pose of each image."""
    posterior = values + np.asarray(log_weights)[:, None, None]
    return np.unravel_index(posterior.reshape(len(values), -1).argmax(1), values.shape[1:])

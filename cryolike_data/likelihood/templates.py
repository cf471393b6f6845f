"""``Templates``: what images are compared with, and the displacements that are tried."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arguments import device_here, square_pixel_size
from ..errors import ArgumentError
from ..transforms import PolarGrid
from ..transforms.polar import EPS
from ..transforms.polar_grid import require_grid, require_within_nyquist
from .projection import project_volume, read_volume, viewing_directions

#: Projections that are made at a time, because they are made in double precision.
_AT_ONCE = 512

#: Groups of templates of which something is noted, to know them again.
_SKETCHED = 64


@dataclass(frozen=True, eq=False, repr=False)
class Templates:
    """Polar Fourier templates without CTF, each with its orientation and its share of the prior.

    Templates are compared at every in-plane rotation of the grid, so that they need to differ in viewing direction only.

    Parameters
    ----------
    fourier : (S, n_shells, n_inplanes) complex transforms on the grid, as ``to_polar`` makes them from images
    grid : the points, with an even number of angles
    box_A : side of the box, angstrom; that of the images
    rotvecs : (S, 3) pose of an image that looks like the template as it is: rotation vector taking the particle frame to the volume
        frame, radian
    log_weights : (S,) logarithm of the prior of each; by default all have 1 / S

    Raises
    ------
    ArgumentError
        if shapes do not fit each other, the number of angles is odd, or a template is zero or not finite
    """

    fourier: Tensor
    grid: PolarGrid
    box_A: float
    rotvecs: Tensor
    log_weights: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.fourier)
        shape = (count, self.grid.n_shells, self.grid.n_inplanes)
        if count == 0 or tuple(self.fourier.shape) != shape or not self.fourier.is_complex():
            kind = f"{tuple(self.fourier.shape)} {self.fourier.dtype}"
            raise ArgumentError(
                f"Templates are complex and of shape (S, {shape[1]}, {shape[2]}) on this grid, with S > 0; these are {kind}."
            )
        require_even(self.grid)
        if not 0 < self.box_A < math.inf:
            raise ArgumentError(f"box_A={self.box_A} (angstrom) must be positive.")
        weights = (
            torch.full((count,), -math.log(count), dtype=torch.float64, device="cpu") if self.log_weights is None else self.log_weights
        )
        object.__setattr__(self, "box_A", float(self.box_A))
        # Small, and looked into for single particles: they stay on the CPU.
        object.__setattr__(self, "log_weights", _on_cpu(weights, torch.float64))
        object.__setattr__(self, "rotvecs", _on_cpu(self.rotvecs, torch.float64))
        for name, wanted in (("rotvecs", (count, 3)), ("log_weights", (count,))):
            value = getattr(self, name)
            if tuple(value.shape) != wanted:
                raise ArgumentError(f"{name} of {count} templates must have shape {wanted}, not {tuple(value.shape)}.")
            never = -math.inf if name == "log_weights" else math.nan  # a weight may be zero
            if not (value.isfinite() | (value == never)).all() or (value == -math.inf).all():
                raise ArgumentError(f"{name} of {count} templates must be finite numbers (a weight of zero is -inf, but not all may be).")
        largest = self.fourier.abs().amax((-2, -1))
        bad = torch.nonzero(~(largest.isfinite() & (largest > 0))).flatten().tolist()
        if bad:
            raise ArgumentError(f"{len(bad)} of {count} templates are zero or not finite, the first is number {bad[0]}.")

    @classmethod
    def from_volume(
        cls,
        volume: str | os.PathLike[str] | Tensor | NDArray[Any],
        grid: PolarGrid,
        *,
        step_deg: float | None = None,
        rotvecs: Any = None,
        pixel_size: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.complex64,
    ) -> Templates:
        """Projections of a volume, by slices through its 3-D transform.

        Parameters
        ----------
        volume : an MRC map, or a (D, D, D) tensor or array with axes (z, y, x) whose origin is voxel D // 2. Its box must be as large as
            that of the images, in angstrom; the number of voxels may differ.
        grid : points of the templates
        step_deg : templates look from directions that are so many degrees apart, all over the sphere
        rotvecs : (S, 3) orientations, in place of ``step_deg``
        pixel_size : voxel size, angstrom; of an MRC map by default what its header says
        device, dtype : where the templates go, and their complex dtype: finufft is asked for 1e-6, for complex128 for 1e-12
        """
        if (step_deg is None) == (rotvecs is None):
            raise ArgumentError("pass either step_deg= (directions all over the sphere) or rotvecs= (orientations of your own)")
        if dtype not in EPS:
            raise ArgumentError(f"dtype of templates is torch.complex64 or torch.complex128, not {dtype}")
        require_grid(grid)
        require_even(grid)
        if isinstance(volume, str | os.PathLike):
            density, in_header = read_volume(volume)
            pixel_size = in_header if pixel_size is None else pixel_size
        else:
            density = _on_cpu(volume)
        if pixel_size is None:
            raise ArgumentError("a volume that is an array needs pixel_size= (angstrom)")
        pixel_size = square_pixel_size(pixel_size)
        require_within_nyquist(grid, density.shape[-1])
        weights = None
        if step_deg is not None:
            rotvecs, weights = viewing_directions(step_deg)
        poses = _on_cpu(rotvecs, torch.float64)
        parts = [project_volume(density, some, grid, eps=EPS[dtype]).to(device, dtype) for some in torch.split(poses, _AT_ONCE)]
        return cls(torch.cat(parts), grid, density.shape[-1] * pixel_size, poses, weights)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Templates:
        """The templates on another device, or as another complex dtype."""
        moved = self.fourier.to(device=None if device is None else device_here(device), dtype=dtype)
        return self if moved is self.fourier else replace(self, fourier=moved)

    def about(self) -> dict[str, Any]:
        """What tells these templates from others, as plain values.

        ``sketch`` holds sums over groups of templates, with random weights, of what each is: its product with fixed random numbers in
        units of its norm, that norm, pose and prior. They are the same but for rounding where templates are made again elsewhere.
        """
        grid = {name: getattr(self.grid, name) for name in ("radius_max", "dist_radii", "n_inplanes")}
        numbers = torch.Generator().manual_seed(0)
        pattern = torch.randn(self.fourier[0].numel(), dtype=torch.float64, device="cpu", generator=numbers).to(self.device)
        products = []
        for template in self.fourier.detach().flatten(1):
            values = template.to(torch.complex128)
            norm = torch.linalg.vector_norm(values)
            products.append(torch.stack([(values.real @ pattern) / norm, (values.imag @ pattern) / norm, norm.log()]))
        shares = torch.as_tensor(self.log_weights, device="cpu").exp()[:, None] * len(self)
        features = torch.cat([torch.stack(products).cpu(), self.rotvecs, shares], dim=1)
        weights = torch.randn(features.shape, dtype=torch.float64, device="cpu", generator=numbers)
        weighted = features * (weights + weights.sign())  # all differ, as templates may change places, and none is near zero
        groups = min(len(self), _SKETCHED)
        sketch = torch.zeros(groups, weighted.shape[1], dtype=torch.float64, device="cpu").index_add_(
            0, torch.arange(len(self), device="cpu") % groups, weighted
        )
        return grid | {"count": len(self), "box_A": self.box_A, "sketch": sketch.tolist()}

    @property
    def device(self) -> torch.device:
        """The device of the templates."""
        return self.fourier.device

    def __len__(self) -> int:
        return len(self.fourier)

    def __repr__(self) -> str:
        size = f"{self.grid.n_shells} shells x {self.grid.n_inplanes} angles"
        return (
            f"Templates({len(self)} of {size}, box {self.box_A:.4g} A, {str(self.fourier.dtype).removeprefix('torch.')} on {self.device})"
        )


def displacement_grid(radius_A: float, step_A: float) -> Tensor:
    """(n, 2) float64 displacements (x, y) in angstrom: a square lattice of ``step_A`` within a disk, the one of zero among them.

    Raises
    ------
    ArgumentError
        if the step is not positive, or the radius is negative
    """
    if not 0 < step_A < math.inf or not 0 <= radius_A < math.inf:
        raise ArgumentError(f"radius_A={radius_A} must not be negative, and step_A={step_A} must be positive (both angstrom).")
    count = int(radius_A / step_A * (1 + 1e-9))
    along = torch.arange(-count, count + 1, dtype=torch.float64, device="cpu") * step_A
    grid = torch.cartesian_prod(along, along)
    return grid[grid.norm(dim=1) <= radius_A * (1 + 1e-9)]


def as_displacements(displacements_A: Any, box_A: float) -> Tensor:
    """Displacements as an (n, 2) float64 tensor on the CPU, or an ``ArgumentError``."""
    try:
        tried = _on_cpu(displacements_A, torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"displacements_A is (n, 2) numbers: (x, y) in angstrom. {error}") from error
    if tried.ndim != 2 or tried.shape[1] != 2 or len(tried) == 0 or not tried.isfinite().all():
        raise ArgumentError(f"displacements_A is (n, 2): (x, y) in angstrom, with n > 0, not {tuple(tried.shape)}")
    if tried.abs().max() > box_A / 2:
        raise ArgumentError(
            f"A displacement of {tried.abs().max():g} A moves the template out of the box of {box_A:g} A: are these angstrom?"
        )
    return tried


def require_fit(grid: PolarGrid, box: int, pixel_size: float, templates: Templates, memory_bytes: int | None) -> None:
    """Raise unless images of this box, transformed on this grid, can be compared with the templates."""
    if memory_bytes is not None and memory_bytes < 1:
        raise ArgumentError(f"memory_bytes is positive, not {memory_bytes}")
    if box < 3:
        raise ArgumentError(f"The likelihood needs images of at least 3 pixels a side, not {box}.")
    require_even(grid)
    if grid != templates.grid:
        raise ArgumentError(f"Images and templates must share a grid; the images' is {grid}, the templates' {templates.grid}.")
    if not math.isclose(box * pixel_size, templates.box_A, rel_tol=1e-3):
        sizes = f"the images' is {box * pixel_size:.6g} A, the templates' {templates.box_A:.6g} A"
        raise ArgumentError(f"Images and templates must share a box; {sizes}.")


def require_even(grid: PolarGrid) -> None:
    """Raise unless half a turn on from every point of the grid there is another one."""
    if grid.n_inplanes % 2:
        raise ArgumentError(f"The likelihood needs an even number of angles on each shell, not n_inplanes={grid.n_inplanes}.")


def _on_cpu(values: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of any kind as a tensor that needs no gradient."""
    if isinstance(values, np.ndarray):  # of which torch refuses those in another byte order, and those that run backwards
        values = values.astype(values.dtype.newbyteorder("="))
    return torch.as_tensor(values, dtype=dtype, device="cpu").detach()

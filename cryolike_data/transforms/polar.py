"""The polar Fourier transform of images as CryoLike defines it: grid, quadrature weights, transform and normalisation.

Axes are CryoLike's: the first coordinate r cos(theta) belongs to the first image axis (rows, y) and r sin(theta) to the second
(columns, x). Units are CryoLike's too: the box is [-1, 1], so that a radius r is the spatial frequency 2 r / box and r = box / 4,
with the box in pixels, is Nyquist. A grid that goes beyond r = box / 4 sees the periodic aliases of the image, not its detail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ArgumentError, MissingDependencyError
from .downsample import square_box


@dataclass(frozen=True)
class PolarGrid:
    """Gauss-Jacobi shells times equally spaced angles, shells first.

    Parameters
    ----------
    radius_max : outer radius, units of 1 / (half box)
    dist_radii : largest mean distance of two shells, the same units
    n_inplanes : number of angles on each shell

    Raises
    ------
    ArgumentError
        if one of them is not positive and finite, or ``n_inplanes`` is not an integer
    """

    radius_max: float
    dist_radii: float
    n_inplanes: int

    def __post_init__(self) -> None:
        for name in ("radius_max", "dist_radii"):
            if not 0 < getattr(self, name) < math.inf:
                raise ArgumentError(f"{name}={getattr(self, name)!r} must be positive and finite (units of 1 / half box).")
        if self.n_inplanes != int(self.n_inplanes) or self.n_inplanes < 1:
            raise ArgumentError(f"n_inplanes={self.n_inplanes!r} must be a positive integer; CryoLike's default is twice the box.")
        object.__setattr__(self, "n_inplanes", int(self.n_inplanes))

    @property
    def n_shells(self) -> int:
        """Number of shells."""
        return 1 + math.ceil(self.radius_max / self.dist_radii)

    @property
    def radii(self) -> NDArray[np.float64]:
        """(n_shells,) radii, ascending, units of 1 / (half box)."""
        return (_jacobi_rule(self.n_shells)[0] + 1) * (self.radius_max / 2)

    @property
    def weights(self) -> NDArray[np.float64]:
        """(n_shells,) weight of a whole shell, CryoLike's ``weight_shells``: they sum to pi radius_max^2 / (2 pi)^2."""
        return _jacobi_rule(self.n_shells)[1] * (2 * math.pi * (self.radius_max / 2) ** 2 / (2 * math.pi) ** 2)

    @property
    def angles(self) -> NDArray[np.float64]:
        """(n_inplanes,) angles, radian, from the first image axis towards the second, 2 pi excluded."""
        return np.linspace(0, 2 * math.pi, self.n_inplanes, endpoint=False)

    @property
    def integration_weights(self) -> NDArray[np.float64]:
        """(n_shells, n_inplanes) weight of each point in an integral over the disk; they sum to pi radius_max^2."""
        shell = self.weights * ((2 * math.pi) ** 2 / self.n_inplanes)
        return np.repeat(shell[:, None], self.n_inplanes, axis=1)


class PolarTransform:
    """The polar Fourier transform of images of one box, through one finufft plan that every call reuses.

    F(r, theta) = 4 pi / D * sum over (j, l) of I[j, l] exp(-i 4 pi / D * (r cos(theta) (j - D//2) + r sin(theta) (l - D//2))), always
    in double precision on the CPU: single precision coordinates would cost three digits. Not thread safe, because finufft plans
    are not: make one for each thread.

    Parameters
    ----------
    grid : points at which to evaluate
    box : D, box of the images, pixels
    eps : relative accuracy asked of finufft, for each image in relation to its own largest pixel (1e-6 or 1e-12 in CryoLike)
    n_trans : transforms a finufft call; with an even ``grid.n_inplanes`` each takes two images. Smaller batches are padded to it.

    Raises
    ------
    MissingDependencyError
        if finufft is not installed
    """

    def __init__(self, grid: PolarGrid, box: int, *, eps: float, n_trans: int = 32) -> None:
        if box < 1 or n_trans < 1 or not eps > 0:
            raise ArgumentError(f"box={box}, n_trans={n_trans} and eps={eps} must all be positive.")
        self.grid, self.box, self.eps, self.n_trans = grid, box, eps, n_trans
        self._plan = _finufft_plan(grid, box, eps, n_trans)
        self._spectra = torch.empty(n_trans, grid.n_shells * grid.n_inplanes, dtype=torch.complex128)  # overwritten by every call
        # A real image has F(-k) = conj F(k), and with an even number of angles -k is on the grid, half a turn on: the transforms
        # of a pair a, b can then be told apart in the one of a + i b.
        self._paired = grid.n_inplanes % 2 == 0

    def __call__(self, images: Tensor) -> Tensor:
        """(B, n_shells, n_inplanes) complex128 on the device of the images, for any number of (B, box, box) real images.

        An image with a NaN or an infinity gives NaN, and leaves the others alone.
        """
        _check_batch(images, self.box)
        pixels = images.detach().to("cpu", torch.float64)
        # Pairing images of very different scale would leave the fainter one with the error of the brighter one.
        scale = pixels.abs().amax((-2, -1), keepdim=True)
        usable = scale.isfinite() & (scale > 0)
        unit = torch.where(usable, pixels / torch.where(usable, scale, 1), 0)
        scale = scale * (4 * math.pi / self.box)
        result = torch.empty(len(images), self.grid.n_shells, self.grid.n_inplanes, dtype=torch.complex128)
        step = self.n_trans * (2 if self._paired else 1)
        for start in range(0, len(images), step):
            group = slice(start, start + step)
            self._transform_group(unit[group], scale[group], result[group])
        return result.to(images.device)

    def _transform_group(self, images: Tensor, scale: Tensor, result: Tensor) -> None:
        """Fill (b, n_shells, n_inplanes) ``result`` from (b, box, box) float64 images, b at most what one finufft call takes."""
        count = -(-len(images) // 2) if self._paired else len(images)
        packed = torch.zeros(self.n_trans, self.box, self.box, dtype=torch.complex128)
        packed.real[:count] = images[:count]
        packed.imag[: len(images) - count] = images[count:]
        self._plan.execute(packed.numpy(), out=self._spectra.numpy())
        spectra = self._spectra[:count].view(count, self.grid.n_shells, self.grid.n_inplanes)
        if not self._paired:
            torch.mul(spectra, scale, out=result)
            return
        half = self.grid.n_inplanes // 2
        at_k, at_minus_k = spectra[..., :half], spectra[..., half:].conj()
        first = (at_k + at_minus_k) * (0.5 * scale[:count])
        second = (at_k - at_minus_k)[: len(images) - count] * (-0.5j * scale[count:])
        for part, rows in ((first, result[:count]), (second, result[count:])):
            rows[..., :half] = part
            rows[..., half:] = part.conj()

    def __repr__(self) -> str:
        return f"PolarTransform({self.grid!r}, box={self.box}, eps={self.eps:g}, n_trans={self.n_trans})"


def to_polar(images: Tensor, grid: PolarGrid, *, eps: float) -> Tensor:
    """Polar Fourier transform of (B, D, D) real images: (B, n_shells, n_inplanes) complex128, to a relative accuracy of ``eps``.

    A ``PolarTransform`` made for one call; where there are many batches, make it once. See there for the formula and the errors.
    """
    box = square_box(images)
    a_transform = 2 if grid.n_inplanes % 2 == 0 else 1
    return PolarTransform(grid, box, eps=eps, n_trans=max(1, min(32, -(-len(images) // a_transform))))(images)


def to_polar_exact(images: Tensor, grid: PolarGrid) -> Tensor:
    """The same as ``to_polar`` by direct summation in float64, on the device of the images and without finufft.

    Costs D^2 complex multiplications an image and point: at D = 128 with CryoLike's default grid about 300 times finufft's
    arithmetic. For tests, for a few images, and where finufft is not installed.

    Parameters
    ----------
    images : (B, D, D) real floating tensor
    grid : points at which to evaluate

    Returns
    -------
    (B, n_shells, n_inplanes) complex128 tensor
    """
    box = square_box(images)
    _check_batch(images, box)
    offset = torch.arange(box, dtype=torch.float64, device=images.device) - box // 2
    angles = torch.as_tensor(grid.angles, device=images.device)
    pixels = images.to(torch.complex128)
    shells = []
    for radius in grid.radii.tolist():  # a shell at a time bounds the memory to (B, D, n_inplanes)
        phase = -4 * math.pi / box * radius * offset
        down = torch.exp(1j * phase[:, None] * angles.cos())
        across = torch.exp(1j * phase[:, None] * angles.sin())
        shells.append(((pixels @ across) * down).sum(-2))
    return torch.stack(shells, dim=1) * (4 * math.pi / box)


def normalize_polar(fourier: Tensor, grid: PolarGrid) -> Tensor:
    """Scale each transform so that the integral of its squared magnitude over the disk is 1, as CryoLike does (``ord=2``).

    Parameters
    ----------
    fourier : (..., n_shells, n_inplanes) complex tensor
    grid : the grid it was evaluated on

    Returns
    -------
    tensor of the same shape and dtype; a transform that is zero everywhere stays zero

    Raises
    ------
    ArgumentError
        if the tensor does not have the shape of the grid
    """
    shape = (grid.n_shells, grid.n_inplanes)
    if tuple(fourier.shape[-2:]) != shape:
        raise ArgumentError(f"The transform is {tuple(fourier.shape)}, but the grid has {shape[0]} shells x {shape[1]} angles.")
    numbers = torch.view_as_real(fourier.resolve_conj())
    weights = torch.as_tensor(grid.integration_weights[:, 0], device=fourier.device)  # the same at all angles
    # As real numbers: norms and products of complex ones are slow.
    of_shells = torch.linalg.vector_norm(numbers.flatten(-2), dim=-1, dtype=torch.float64)
    power = (of_shells.square() * weights).sum(-1)[..., None, None, None]
    scale = torch.where(power == 0, 1, power).rsqrt().to(numbers.dtype)
    return torch.view_as_complex(numbers * scale)


@lru_cache(maxsize=8)
def _jacobi_rule(count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes and weights of Gauss-Jacobi quadrature with alpha = 0, beta = 1: the weight function is 1 + x on [-1, 1].

    Golub and Welsch (Math. Comp. 23, 1969): the nodes are the eigenvalues of the symmetric tridiagonal matrix of the three-term
    recurrence, the weights the integral of the weight function (2) times the squared first components of its eigenvectors.
    """
    k = np.arange(count, dtype=np.float64)
    diagonal = 1 / ((2 * k + 1) * (2 * k + 3))
    beside = np.sqrt(k[1:] * (k[1:] + 1)) / (2 * k[1:] + 1)
    nodes, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
    weights = 2 * vectors[0] ** 2
    for array in (nodes, weights):
        array.setflags(write=False)  # shared by every grid with this many shells
    return nodes, weights


def require_finufft() -> Any:
    """The package finufft, or a ``MissingDependencyError`` that says how to get it."""
    try:
        import finufft
    except ImportError as error:
        raise MissingDependencyError('The polar transform needs finufft: pip install "cryolike-data[fourier]".') from error
    return finufft


def _finufft_plan(grid: PolarGrid, box: int, eps: float, n_trans: int) -> Any:
    finufft = require_finufft()
    radial = (4 * math.pi / box) * grid.radii[:, None]
    # As many threads as torch may use, so that the worker processes of a DataLoader keep to one each; two transforms at a time for each,
    # which share the work on the points. By default finufft takes one.
    threads = torch.get_num_threads()
    plan = finufft.Plan(2, (box, box), n_trans, eps, -1, "complex128", nthreads=threads, maxbatchsize=2 * threads)
    plan.setpts((radial * np.cos(grid.angles)).ravel(), (radial * np.sin(grid.angles)).ravel())
    return plan


def _check_batch(images: Tensor, box: int) -> None:
    if images.ndim != 3 or square_box(images) != box:
        raise ArgumentError(f"The polar transform takes (B, {box}, {box}) images; these are {tuple(images.shape)}.")

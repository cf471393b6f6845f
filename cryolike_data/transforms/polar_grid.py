"""``PolarGrid``: the points at which polar Fourier transforms are known, with CryoLike's quadrature weights.

Units are CryoLike's: the box is [-1, 1], so that a radius r is the spatial frequency 2 r / box and r = box / 4, with the box in pixels,
is Nyquist. A grid that goes beyond r = box / 4 sees the periodic aliases of the image, not its detail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError


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
            object.__setattr__(self, name, float(getattr(self, name)))
        if not 1 <= self.n_inplanes < math.inf or self.n_inplanes != int(self.n_inplanes):
            raise ArgumentError(f"n_inplanes={self.n_inplanes!r} must be a positive integer; CryoLike's default is twice the box.")
        object.__setattr__(self, "n_inplanes", int(self.n_inplanes))

    @classmethod
    def of_box(cls, box: int, *, resolution_factor: float = 1.0, n_inplanes: int | None = None) -> PolarGrid:
        """CryoLike's default grid for images of ``box`` pixels.

        Parameters
        ----------
        box : pixels
        resolution_factor : 1 reaches the Nyquist frequency, 0.5 half of it
        n_inplanes : number of angles; twice the box by default
        """
        if not 0 < resolution_factor < math.inf:
            raise ArgumentError(f"resolution_factor={resolution_factor} must be positive; 1 reaches the Nyquist frequency.")
        return cls(resolution_factor * box / 4, 0.25, 2 * box if n_inplanes is None else n_inplanes)

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


def require_grid(grid: object) -> None:
    """Raise ``ArgumentError`` for anything but a ``PolarGrid``."""
    if not isinstance(grid, PolarGrid):
        raise ArgumentError(f"grid is a PolarGrid, such as PolarGrid.of_box(64), not {grid!r}")


def require_within_nyquist(grid: PolarGrid, box: int) -> None:
    """Raise ``ArgumentError`` if a grid goes beyond what images of ``box`` pixels hold."""
    if told := describe_aliases(grid, box):
        raise ArgumentError(f"{told} Take PolarGrid.of_box({box}), or images that are not downsampled so far.")


def describe_aliases(grid: PolarGrid, box: int) -> str:
    """What to say of a grid that goes beyond what images of ``box`` pixels hold; nothing of others."""
    if grid.radius_max <= box / 4 * (1 + 1e-6):
        return ""
    limit = f"{box / 4:g}, the Nyquist frequency of {box} pixels"
    return f"The grid goes to radius {grid.radius_max:g}, beyond {limit}, where there are only aliases."


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
    return nodes, weights

"""``PolarBatch`` and ``PolarCollate``: batches that also carry their polar Fourier transforms and their CTF on the same grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor

from .batch import ParticleBatch
from .collate import Collate
from .columns import Columns
from .ctf import Ctf, CtfTerm, ctf_values, require_terms
from .errors import MixedParticlesError
from .transforms import Downsample, Normalize, PolarGrid, normalize_polar, to_polar
from .transforms.normalize import NormalizeMethod
from .transforms.polar_grid import require_grid, require_within_nyquist


@dataclass(frozen=True, eq=False, repr=False)
class PolarBatch(ParticleBatch):
    """A ``ParticleBatch`` with the polar Fourier transforms of its images.

    Attributes
    ----------
    fourier : (B, n_shells, n_inplanes) complex transforms, axes as in ``to_polar``
    polar_ctf : (B, n_shells, n_inplanes) CTF at the same points, or None where the table has no ctf columns; complex only where
        beam tilt or trefoil were asked for
    grid : the points
    """

    fourier: Tensor = field(kw_only=True)
    polar_ctf: Tensor | None = field(kw_only=True)
    grid: PolarGrid = field(kw_only=True)

    @property
    def box_A(self) -> float:
        """Length of a side of the box, angstrom."""
        return self.box * self.pixel_size

    def map_images(self, function: Callable[[Tensor], Tensor], columns: Columns) -> Self:
        """A batch with ``function`` applied to images, transforms and the CTF on the grid, and other columns."""
        ctf = None if self.polar_ctf is None else function(self.polar_ctf)
        return replace(super().map_images(function, columns), fourier=function(self.fourier), polar_ctf=ctf)

    def joined(self, parts: Sequence[Self]) -> Self:
        """The rows of several batches, this one and others like it, one after the other."""
        if len({part.grid for part in parts}) > 1:
            raise MixedParticlesError("These batches have polar transforms on different grids; use one DataLoader for each.")
        ctf = [part.polar_ctf for part in parts if part.polar_ctf is not None]
        fourier = torch.cat([part.fourier for part in parts])
        return replace(super().joined(parts), fourier=fourier, polar_ctf=torch.cat(ctf) if ctf else None)

    def __repr__(self) -> str:
        with_ctf = "" if self.polar_ctf is None else " and CTF"
        polar = f"polar Fourier transforms{with_ctf} on {self.grid.n_shells} shells x {self.grid.n_inplanes} angles"
        return f"{super().__repr__().removesuffix(')').replace('ParticleBatch', 'PolarBatch', 1)}; {polar})"


@dataclass(frozen=True, init=False)
class PolarCollate(Collate):
    """A ``Collate`` whose batches carry polar Fourier transforms: a ``PolarBatch``.

    With ``normalize="max"`` and ``unit_power=True`` they are what CryoLike's converter writes.

    Parameters
    ----------
    grid : points of the transforms, which end at the Nyquist frequency of the images after downsampling, radius box / 4, or before
    downsample, normalize, device, dtype : see ``Collate``. With float64 all is done in double precision and the transforms are
        complex128, for which finufft is asked for 1e-12; otherwise they are complex64, see ``PolarTransform`` for how accurate that is.
    unit_power : scale each transform so that the integral of its squared magnitude is 1 (``normalize_polar``)
    ctf_terms : higher-order terms of the CTF to apply, see ``ctf_values``
    """

    grid: PolarGrid = field(kw_only=True)
    unit_power: bool = field(kw_only=True)
    ctf_terms: tuple[CtfTerm, ...] = field(kw_only=True)

    def __init__(
        self,
        grid: PolarGrid,
        *,
        downsample: Downsample | None = None,
        normalize: NormalizeMethod | Normalize | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        unit_power: bool = False,
        ctf_terms: tuple[CtfTerm, ...] = (),
    ) -> None:
        require_grid(grid)
        given = (downsample, normalize, device, dtype, grid, unit_power, require_terms(ctf_terms))
        for about, value in zip(fields(self), given, strict=True):
            object.__setattr__(self, about.name, value)
        self.__post_init__()

    def _process(self, batch: ParticleBatch) -> PolarBatch:
        read = super()._process(batch)
        require_within_nyquist(self.grid, read.box)
        dtype = torch.complex128 if self.dtype == torch.float64 else torch.complex64
        fourier = to_polar(read.images, self.grid, dtype=dtype)
        if self.unit_power:
            fourier = normalize_polar(fourier, self.grid, out=fourier)
        ctf = read.ctf
        values = None if ctf is None else polar_ctf(ctf, self.grid, read.box * read.pixel_size, dtype=dtype.to_real(), terms=self.ctf_terms)
        return PolarBatch(read.images, read.pixel_size, read.columns, fourier=fourier, polar_ctf=values, grid=self.grid)


def polar_ctf(ctf: Ctf[Tensor], grid: PolarGrid, box_A: float, *, dtype: torch.dtype, terms: tuple[CtfTerm, ...] = ()) -> Tensor:
    """The CTF of each particle on a polar grid, whose angles count from y (rows) towards x (columns).

    Parameters
    ----------
    ctf : optics, (B,) tensors; the result lies on their device
    grid : the points
    box_A : side of the box of the images, angstrom
    dtype : real dtype of the result
    terms : higher-order terms, see ``ctf_values``

    Returns
    -------
    (B, n_shells, n_inplanes) tensor, complex where a term asks for it
    """
    (some,) = ctf.require("defocus_u")
    k = torch.as_tensor(grid.radii * (2 / box_A), device=some.device)[:, None]
    turned = torch.as_tensor(math.pi / 2 - grid.angles, device=some.device)
    even = grid.n_inplanes % 2 == 0  # then -k is on the grid, half a turn on, where the CTF is the conjugate
    if even:
        turned = turned[: grid.n_inplanes // 2]
    values = ctf_values(ctf, k, turned, terms=terms)
    values = values.to(dtype.to_complex() if values.is_complex() else dtype)
    return torch.cat([values, values.conj() if values.is_complex() else values], dim=-1) if even else values

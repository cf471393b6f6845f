"""Per-particle optics and the contrast transfer function (CTF) they define.

Sign and axes are RELION's: a positive defocus is underfocus, the value at zero frequency is plus the amplitude contrast,
and the astigmatism angle runs from x (the fast axis, columns) towards y (rows).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import ArgumentError, TableError

ArrayT = TypeVar("ArrayT")
OtherT = TypeVar("OtherT")
NumberT = TypeVar("NumberT", float, NDArray[np.float64], Tensor)

# CODATA 2018, SI units.
_PLANCK = 6.62607015e-34
_CHARGE = 1.602176634e-19
_LIGHT_SPEED = 299792458.0
_ELECTRON_MASS = 9.1093837015e-31


@dataclass(frozen=True, eq=False)
class Ctf(Generic[ArrayT]):
    """CTF parameters, one row per particle, as NumPy arrays (in ``Particles``) or tensors (in ``ParticleBatch``).

    A field that the table does not hold is None.

    Attributes
    ----------
    voltage_kv : (N,) acceleration voltage, kV
    spherical_aberration_mm : (N,) Cs, mm
    amplitude_contrast : (N,) fraction, 0 to 1
    defocus_u, defocus_v : (N,) underfocus along and across the astigmatism axis, angstrom
    astigmatism_angle_rad : (N,) angle of the defocus U axis from x towards y, radian
    phase_shift_rad : (N,) phase plate shift, radian
    exposure_group : (N,) integer id of the exposure (optics) group
    scale : (N,) per-particle scale (``ctf/scale``)
    bfactor_A2 : (N,) B-factor, angstrom squared
    beam_shift_A, tilt_A, trefoil_A : (N, 2) higher-order terms as CryoSPARC writes them, angstrom
    tetrafoil_A : (N, 4) angstrom
    anisomag : (N, 4) anisotropic magnification, row-major M - I
    """

    voltage_kv: ArrayT | None = None
    spherical_aberration_mm: ArrayT | None = None
    amplitude_contrast: ArrayT | None = None
    defocus_u: ArrayT | None = None
    defocus_v: ArrayT | None = None
    astigmatism_angle_rad: ArrayT | None = None
    phase_shift_rad: ArrayT | None = None
    exposure_group: ArrayT | None = None
    scale: ArrayT | None = None
    bfactor_A2: ArrayT | None = None
    beam_shift_A: ArrayT | None = None
    tilt_A: ArrayT | None = None
    trefoil_A: ArrayT | None = None
    tetrafoil_A: ArrayT | None = None
    anisomag: ArrayT | None = None

    def items(self) -> list[tuple[str, ArrayT]]:
        """The fields that are present, as (name, array) pairs."""
        pairs = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in pairs if value is not None]

    def map(self, function: Callable[[ArrayT], OtherT]) -> Ctf[OtherT]:
        """A Ctf with ``function`` applied to every field that is present."""
        changed: dict[str, Any] = {name: function(value) for name, value in self.items()}
        return Ctf(**changed)

    def require(self, *names: str) -> list[ArrayT]:
        """The named fields, or a ``TableError`` naming all that are absent."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise TableError(f"The table has no {', '.join(missing)}; pass the file that holds the ctf/* columns as passthrough=.")
        return [getattr(self, name) for name in names]


def electron_wavelength_A(voltage_kv: NumberT) -> NumberT:
    """Relativistic de Broglie wavelength, angstrom, of electrons accelerated by ``voltage_kv`` (kV): h / sqrt(2 m e V + (e V / c)^2).

    A number, array or tensor gives the same kind; 300 kV is 0.019687 A.
    """
    # In units of the rest energy, so that float32 tensors meet no number near 1e-60.
    energy = voltage_kv * (1e3 * _CHARGE / (_ELECTRON_MASS * _LIGHT_SPEED**2))
    compton_A = 1e10 * _PLANCK / (_ELECTRON_MASS * _LIGHT_SPEED)
    root: NumberT = (energy * (energy + 2)) ** 0.5
    return compton_A / root


def ctf_values(ctf: Ctf[Tensor], frequency: Tensor, angle_rad: Tensor) -> Tensor:
    """Contrast transfer function of each particle on a grid of spatial frequencies.

    With dz = (U + V) / 2 + (U - V) / 2 cos(2 (angle - angle0)), signed (U < V is legal), and
    gamma = -pi lambda dz k^2 + pi / 2 Cs lambda^3 k^4 - phase, the value is -sqrt(1 - w^2) sin(gamma) + w cos(gamma):
    RELION's -sin(gamma - asin(w)). The B-factor, the scale and the higher-order terms are not applied.

    Parameters
    ----------
    ctf : optics, (B,) tensors; a missing phase shift counts as none, every other term above is required
    frequency : (*grid) magnitude of the spatial frequency k, 1/angstrom
    angle_rad : tensor that broadcasts with ``frequency``: direction of k from x (columns) towards y (rows), radian

    Returns
    -------
    (B, *grid) tensor on the device of ``frequency``: float64, or float32 for a float32 grid on an accelerator

    Raises
    ------
    TableError
        if the table did not hold the optics
    """
    kv, cs_mm, contrast, u, v, axis = ctf.require(
        "voltage_kv", "spherical_aberration_mm", "amplitude_contrast", "defocus_u", "defocus_v", "astigmatism_angle_rad"
    )
    phase = torch.zeros_like(u) if ctf.phase_shift_rad is None else ctf.phase_shift_rad
    single = frequency.device.type != "cpu" and frequency.dtype == torch.float32
    dtype = torch.float32 if single else torch.float64
    k, angle = frequency.to(dtype), angle_rad.to(frequency.device, dtype)
    axes = max(k.ndim, angle.ndim)

    def column(values: Tensor) -> Tensor:
        return values.to(frequency.device, dtype).reshape(-1, *(1,) * axes)

    kv, cs_mm, contrast, u, v, axis, phase = map(column, (kv, cs_mm, contrast, u, v, axis, phase))
    wavelength = electron_wavelength_A(kv)
    defocus = (u + v) / 2 + (u - v) / 2 * torch.cos(2 * (angle - axis))
    k2 = k**2
    gamma = -math.pi * wavelength * defocus * k2 + (math.pi / 2 * 1e7) * cs_mm * wavelength**3 * k2**2 - phase
    return -torch.sqrt(1 - contrast**2) * torch.sin(gamma) + contrast * torch.cos(gamma)


def half_plane(box: int, pixel_size: float, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Spatial frequency (1/angstrom) and direction (radian, from x towards y) of every coefficient of ``torch.fft.rfft2``.

    Parameters
    ----------
    box : box of the images, pixels
    pixel_size : angstrom
    device : where the result shall lie

    Returns
    -------
    frequency, angle : (box, box // 2 + 1) float64 tensors

    Raises
    ------
    ArgumentError
        if the box or the pixel size is not positive
    """
    if box < 1 or not 0 < pixel_size < math.inf:
        raise ArgumentError(f"box={box} (pixels) and pixel_size={pixel_size} (angstrom) must be positive.")
    ky = torch.fft.fftfreq(box, pixel_size, dtype=torch.float64, device=device)[:, None]
    kx = torch.fft.rfftfreq(box, pixel_size, dtype=torch.float64, device=device)
    return torch.hypot(kx, ky), torch.atan2(ky, kx)

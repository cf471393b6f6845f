"""Per-particle optics and the contrast transfer function (CTF) they define.

Sign and axes are RELION's: a positive defocus is underfocus, the value at zero frequency is plus the amplitude contrast,
and the astigmatism angle runs from x (the fast axis, columns) towards y (rows).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import ArgumentError, TableError

ArrayT = TypeVar("ArrayT")
OtherT = TypeVar("OtherT")
NumberT = TypeVar("NumberT", float, NDArray[np.float64], Tensor)

#: The higher-order terms that ``ctf_values`` can apply.
CtfTerm = Literal["bfactor", "beam_tilt", "trefoil", "tetrafoil", "anisomag"]

#: What the particles of an exposure group share, and what each has of its own: all that a CTF takes.
MICROSCOPE = ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast")
DEFOCUS = ("defocus_u", "defocus_v", "astigmatism_angle_rad")
_OPTICS = MICROSCOPE + DEFOCUS
_TERM_FIELD: dict[CtfTerm, str] = {
    "bfactor": "bfactor_A2",
    "beam_tilt": "tilt_A",
    "trefoil": "trefoil_A",
    "tetrafoil": "tetrafoil_A",
    "anisomag": "anisomag",
}
#: Order of the harmonic of an odd term, and its phase in units of lambda^2 k^3.
_ODD: dict[CtfTerm, tuple[int, float]] = {"beam_tilt": (1, -2 * math.pi), "trefoil": (3, -2 * math.pi / 3)}

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

    def __repr__(self) -> str:
        about = [name if value.ndim else f"{name}={float(value):g}" for name, value in self.items()]  # type: ignore[attr-defined, arg-type]
        first = next(iter(self.items()), None)
        rows = f"{len(first[1]):,} particles: " if first is not None and first[1].ndim else ""  # type: ignore[attr-defined, arg-type]
        return f"Ctf({rows}{', '.join(about)})"

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


def ctf_values(ctf: Ctf[Tensor] | Ctf[np.ndarray], frequency: Tensor, angle_rad: Tensor, *, terms: Collection[CtfTerm] = ()) -> Tensor:
    """Contrast transfer function of each particle on a grid of spatial frequencies.

    With dz = (U + V) / 2 + (U - V) / 2 cos(2 (angle - angle0)), signed (U < V is legal), and
    gamma = -pi lambda dz k^2 + pi / 2 Cs lambda^3 k^4 - phase, the value is RELION's -sin(gamma - asin(w)).
    The scale and the beam shift are not applied; the other higher-order terms only where ``terms`` asks for them.

    Parameters
    ----------
    ctf : optics, (B,) tensors or arrays, or those of a single particle (B = 1); a missing phase shift counts as none, every other term
        above is required
    frequency : (*grid) magnitude of the spatial frequency k, 1/angstrom
    angle_rad : tensor that broadcasts with ``frequency``: direction of k from x (columns) towards y (rows), radian
    terms : higher-order terms to apply; a column of zeros changes nothing but, for the odd terms, the dtype

    Returns
    -------
    (B, *grid) tensor on the device of ``frequency``: float64, or float32 for a float32 grid on an accelerator. With an odd
    term (beam_tilt, trefoil) it is complex, of the same precision. It is the factor between the transforms, in the sense of
    sum I exp(-2 pi i k x), of the ideal projection and of the image.

    Raises
    ------
    ArgumentError
        if ``terms`` holds an unknown name
    TableError
        if the table did not hold the optics, or the column of a term

    Notes
    -----
    With a the angle and k the frequency:

    - bfactor: the value times exp(-B k^2 / 4).
    - beam_tilt, odd: the value times exp(i p), p = -2 pi lambda^2 k^3 (t0 cos a + t1 sin a), t being ``tilt_A``.
    - trefoil, odd: the same with p = -2 pi / 3 lambda^2 k^3 (t0 cos 3a + t1 sin 3a), t being ``trefoil_A``.
    - tetrafoil, even: gamma grows by lambda^3 k^4 (2 pi (t0 cos 2a + t1 sin 2a) + pi / 2 (t2 cos 4a + t3 sin 4a)). Our gamma has
      the sign of RELION's and of the wave aberration chi in exp(-i chi), so that Cs and even terms enter with plus.
    - anisomag: everything is evaluated at M (kx, ky), M = I + ``anisomag``. The projection belongs at M (kx, ky) as well; that is
      left to the caller.

    How well this is attested: bfactor and anisomag are RELION's (``ctf.h``, ``obs_model.cpp``). So is beam_tilt with its sign
    (``tilt_helper.cpp``; ``selfApplyBeamTilt`` takes the same phase out of images), if ``tilt_A`` is Cs times the tilt with the
    sign of rlnBeamTilt, as specter takes it. CryoSPARC has not published its own formulas. Trefoil and tetrafoil are
    what the package specter reports from CryoSPARC's ``newctf.py``, with specter's angle, which runs from y to x, turned into ours.
    The signs of trefoil and beam tilt relative to each other are specter's too, but specter uses both in exp(-i p), against RELION.
    So the common sign of the odd terms is RELION's and not confirmed for CryoSPARC's tables; ``.conj()`` of the result has the other.
    """
    asked = require_terms(terms)
    ctf = ctf.map(lambda values: torch.from_numpy(np.array(values)) if isinstance(values, np.ndarray | np.generic) else values)
    columns = require_optics(ctf, asked)
    if columns[0].ndim == 0:  # of a single particle
        columns = [values[None] for values in columns]
    single = frequency.device.type != "cpu" and frequency.dtype == torch.float32
    dtype = torch.float32 if single else torch.float64
    k, angle = frequency.to(dtype), angle_rad.to(frequency.device, dtype)
    axes = max(k.ndim, angle.ndim)

    def column(values: Tensor) -> Tensor:
        return values.to(frequency.device, dtype).reshape(-1, *(1,) * axes)

    kv, cs_mm, contrast, u, v, axis = map(column, columns[: len(_OPTICS)])
    extra = {
        term: [column(part) for part in (values[:, None] if values.ndim == 1 else values).unbind(1)]
        for term, values in zip(asked, columns[len(_OPTICS) :], strict=True)
    }
    if "anisomag" in extra:
        k, angle = _magnified(k, angle, extra["anisomag"])
    wavelength = electron_wavelength_A(kv)
    defocus = (u + v) / 2 + (u - v) / 2 * torch.cos(2 * (angle - axis))
    k2 = k**2
    gamma = -math.pi * wavelength * defocus * k2 + (math.pi / 2 * 1e7) * cs_mm * wavelength**3 * k2**2
    constant = torch.asin(contrast)
    if ctf.phase_shift_rad is not None:
        constant = constant + column(ctf.phase_shift_rad)
    if "tetrafoil" in extra:
        two, four = extra["tetrafoil"][:2], extra["tetrafoil"][2:]
        fold = 2 * math.pi * _harmonic(2, angle, two) + math.pi / 2 * _harmonic(4, angle, four)
        gamma = gamma + wavelength**3 * fold * k2**2
    value = -torch.sin(gamma - constant)
    if "bfactor" in extra:
        value = value * torch.exp(-extra["bfactor"][0] / 4 * k2)
    odd = [factor * _harmonic(order, angle, extra[term]) for term, (order, factor) in _ODD.items() if term in extra]
    if not odd:
        return value
    phase = wavelength**2 * sum(odd[1:], start=odd[0]) * k**3
    return torch.complex(value * torch.cos(phase), value * torch.sin(phase))


def require_optics(ctf: Ctf[ArrayT] | None, terms: Collection[CtfTerm] = ()) -> list[ArrayT]:
    """What a CTF takes of the optics, and then the columns of the terms, or a ``TableError`` naming all that are absent."""
    known = Ctf[ArrayT]() if ctf is None else ctf
    return known.require(*_OPTICS, *(_TERM_FIELD[term] for term in require_terms(terms)))


def require_terms(terms: Collection[CtfTerm]) -> tuple[CtfTerm, ...]:
    """The terms, each once and in a fixed order, or an ``ArgumentError`` if one of them is unknown."""
    if isinstance(terms, str) or not set(terms) <= set(_TERM_FIELD):
        raise ArgumentError(f"terms={terms!r} must be a tuple, list or set of names out of {', '.join(_TERM_FIELD)}.")
    return tuple(term for term in _TERM_FIELD if term in terms)


def _harmonic(order: int, angle: Tensor, pair: list[Tensor]) -> Tensor:
    """The sum c cos(order angle) + s sin(order angle) for the pair (c, s)."""
    return pair[0] * torch.cos(order * angle) + pair[1] * torch.sin(order * angle)


def _magnified(k: Tensor, angle: Tensor, anisomag: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Magnitude and angle, (B, *grid), of M (kx, ky) with M - I given row by row."""
    kx, ky = k * torch.cos(angle), k * torch.sin(angle)
    xx, xy, yx, yy = anisomag
    kx, ky = kx + (xx * kx + xy * ky), ky + (yx * kx + yy * ky)
    # Zero frequency stays where it is, and its direction has no gradient but NaN.
    kx, ky = (torch.where(k == 0, 0, part) for part in (kx, ky))
    return torch.hypot(kx, ky), torch.atan2(ky, kx)


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

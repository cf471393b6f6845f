"""RELION's optics groups: the particles that share everything which the ``optics`` block of a star file holds."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from .ctf import MICROSCOPE, Ctf

log = logging.getLogger(__name__)

# RELION tells trefoil and tetrafoil by Zernike polynomials; how those of CryoSPARC translate is confirmed by nothing at hand.
_LEFT_OUT = ("beam_shift_A", "trefoil_A", "tetrafoil_A")
#: What a group has in common, and how many numbers each of it is.
_SHARED = {"exposure_group": 1} | dict.fromkeys(MICROSCOPE, 1) | {"tilt_A": 2, "anisomag": 4}


@dataclass(frozen=True)
class OpticsGroups:
    """The optics groups of particles, which are looked through piece by piece: once to find them, once more to number the particles.

    A group is one combination of exposure group (1 where the table has none), voltage, spherical aberration and amplitude
    contrast, and of beam tilt and anisotropic magnification where any particle has them. Groups are in the order of the exposure
    groups.

    Attributes
    ----------
    columns : by RELION's name, one row per group
    left_out : fields of ``Ctf`` that some particle has and a star file does not tell: beam shift, trefoil and tetrafoil, and a beam tilt
        without spherical aberration
    half_sets : which there are among the particles
    """

    columns: dict[str, np.ndarray]
    left_out: tuple[str, ...]
    _numbers: dict[bytes, int]
    half_sets: frozenset[int] = frozenset()

    @classmethod
    def of(cls, parts: Iterable[Ctf[np.ndarray]]) -> Self:
        """The groups of particles whose optics come in pieces.

        Raises
        ------
        TableError
            if voltage, spherical aberration or amplitude contrast are not known
        """
        rows: dict[bytes, np.ndarray] = {}
        dtypes: dict[str, np.dtype[Any]] = {}
        left_out: dict[str, None] = {}
        for ctf in parts:
            ctf.require(*MICROSCOPE)
            left_out |= dict.fromkeys(name for name in _LEFT_OUT if (value := getattr(ctf, name)) is not None and value.any())
            dtypes |= {name: value.dtype for name, value in ctf.items()}
            shared = _shared(ctf)
            rows |= {row.tobytes(): row for row in shared[_different(shared)[0]]}
        found = np.array(list(rows.values())).reshape(-1, sum(_SHARED.values()))
        found = found[np.lexsort(found.T[::-1])]
        of = _by_name(found)
        if (of["tilt_A"].any(axis=1) & (of["spherical_aberration_mm"][:, 0] == 0)).any():
            left_out["tilt_A of particles without spherical aberration"] = None
        return cls(_columns(found, dtypes), tuple(left_out), {row.tobytes(): number for number, row in enumerate(found, 1)})

    def warn(self) -> None:
        """Log what is lost, if anything is, and what is not certain."""
        if self.left_out:
            log.warning("%s: left out of the star file, which cannot tell such, or not with certainty.", ", ".join(self.left_out))
        if "rlnBeamTiltX" in self.columns:
            log.warning("The beam tilt in the star file has RELION's sign, if tilt_A has that; nothing published says so.")

    def numbers(self, ctf: Ctf[np.ndarray]) -> np.ndarray:
        """(N,) int64, the group of each of N of the particles, from 1 without gaps."""
        shared = _shared(ctf)
        first, code = _different(shared)
        numbers = np.array([self._numbers[row.tobytes()] for row in shared[first]], np.int64)
        of_each: np.ndarray = numbers[code]
        return of_each


def _shared(ctf: Ctf[np.ndarray]) -> np.ndarray:
    """(N, numbers) float64, what a group has in common, for each particle."""
    n = len(ctf.require(*MICROSCOPE)[0])
    absent = {"exposure_group": np.ones(n)}
    values = {name: getattr(ctf, name) for name in _SHARED}
    columns = [
        (absent.get(name, np.zeros((n, size))) if values[name] is None else values[name]).reshape(n, size) for name, size in _SHARED.items()
    ]
    shared: np.ndarray = np.concatenate(columns, axis=1, dtype=np.float64) + 0.0  # no negative zeros, which would make other groups
    return shared


def _by_name(shared: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(_SHARED, np.split(shared, np.cumsum(list(_SHARED.values()))[:-1], axis=1), strict=True))


def _different(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each different row is met first, in the order of the rows, and each row's place among them."""
    code = np.zeros(len(rows), np.int64)
    first = code[:1]
    for column in rows.T:
        if len(rows) and not (column == column[0]).all():
            values, number = np.unique(column, return_inverse=True)
            _, first, code = np.unique(code * len(values) + number, return_index=True, return_inverse=True)
    return first, code


def _columns(groups: np.ndarray, dtypes: dict[str, np.dtype[Any]]) -> dict[str, np.ndarray]:
    """The block of these groups."""
    of = {name: part.astype(dtypes.get(name, np.float64)) for name, part in _by_name(groups).items()}
    names = np.array(list(_group_names(of["exposure_group"][:, 0].astype(np.int64).tolist())), object)
    columns = {"rlnOpticsGroupName": names, "rlnOpticsGroup": np.arange(1, len(groups) + 1)}
    columns |= zip(("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"), (of[name][:, 0] for name in MICROSCOPE), strict=True)
    tilt_mrad = _beam_tilt_mrad(of["tilt_A"], of["spherical_aberration_mm"])
    if tilt_mrad.any():
        columns |= zip(("rlnBeamTiltX", "rlnBeamTiltY"), tilt_mrad.T, strict=True)
    if of["anisomag"].any():
        matrix = np.eye(2).ravel() + of["anisomag"]
        columns |= zip(("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11"), matrix.T, strict=True)
    return columns


def _beam_tilt_mrad(tilt_A: np.ndarray, cs_mm: np.ndarray) -> np.ndarray:
    """tilt_A / Cs: RELION's phase is proportional to the tilt times Cs (``TiltHelper``); 0 where there is no Cs to tell it by."""
    cs_A = cs_mm.astype(np.float64) * 1e7
    return np.where(cs_A > 0, tilt_A.astype(np.float64) / np.where(cs_A > 0, cs_A, 1) * 1e3, 0)


def _group_names(exposures: list[int]) -> Iterable[str]:
    """Names after the exposure groups, numbered where one exposure group makes several."""
    total, so_far = Counter(exposures), Counter[int]()
    for exposure in exposures:
        so_far[exposure] += 1
        yield f"opticsGroup{exposure}" + (f"_{so_far[exposure]}" if total[exposure] > 1 else "")

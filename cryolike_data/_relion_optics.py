"""RELION's optics groups: the particles that share everything which the ``optics`` block of a star file holds."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import numpy as np

from .ctf import Ctf
from .errors import TableError

log = logging.getLogger(__name__)

# Without an equivalent in RELION (beam shift), or without one that holds for every box.
_LEFT_OUT = ("beam_shift_A", "trefoil_A", "tetrafoil_A")


def group_optics(ctf: Ctf[np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The optics group of each particle, and what each group has in common.

    A group is one combination of exposure group (1 where the table has none), voltage, spherical aberration and amplitude
    contrast, and of beam tilt and anisotropic magnification where any particle has them. Beam shift, trefoil and tetrafoil are left
    out, with one warning where any particle has them.

    Parameters
    ----------
    ctf : optics of N particles

    Returns
    -------
    group : (N,) int64, from 1 without gaps, in the order of the exposure groups
    columns : by RELION's name, one row per group in that order

    Raises
    ------
    TableError
        if voltage, spherical aberration or amplitude contrast are not known, or a beam tilt is impossible
    """
    shared = shared_optics(ctf)
    left_out = [name for name in _LEFT_OUT if (value := getattr(ctf, name)) is not None and value.any()]
    if left_out:
        log.warning("%s: left out of the star file, because RELION has no equivalent that holds for every box.", ", ".join(left_out))
    exposure = ctf.exposure_group
    if exposure is None:
        exposure = np.ones(len(shared["rlnVoltage"]), np.int64)
    code = np.zeros(len(exposure), np.int64)
    first = code[:0]
    for column in (exposure, *shared.values()):
        values, number = np.unique(column, return_inverse=True)
        _, first, code = np.unique(code * len(values) + number, return_index=True, return_inverse=True)
    names = np.array(list(_group_names(exposure[first].tolist())), object)
    columns = {"rlnOpticsGroupName": names, "rlnOpticsGroup": np.arange(1, len(first) + 1)}
    return code + 1, columns | {name: column[first] for name, column in shared.items()}


def shared_optics(ctf: Ctf[np.ndarray]) -> dict[str, np.ndarray]:
    """What a group has in common besides the exposure group, for each particle."""
    kv, cs_mm, contrast = ctf.require("voltage_kv", "spherical_aberration_mm", "amplitude_contrast")
    shared = {"rlnVoltage": kv, "rlnSphericalAberration": cs_mm, "rlnAmplitudeContrast": contrast}
    if ctf.tilt_A is not None and ctf.tilt_A.any():
        shared |= zip(("rlnBeamTiltX", "rlnBeamTiltY"), _beam_tilt_mrad(ctf.tilt_A, cs_mm).T, strict=True)
    if ctf.anisomag is not None and ctf.anisomag.any():
        matrix = np.eye(2).ravel() + ctf.anisomag
        shared |= zip(("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11"), matrix.T, strict=True)
    return shared


def _beam_tilt_mrad(tilt_A: np.ndarray, cs_mm: np.ndarray) -> np.ndarray:
    """The angle whose sine is tilt_A / Cs, as pyem converts it."""
    tilt, cs_A = tilt_A.astype(np.float64), cs_mm.astype(np.float64)[:, None] * 1e7
    impossible = (np.abs(tilt) > cs_A).any(axis=1)
    if impossible.any():
        raise TableError(
            f"The beam tilt (tilt_A) of {impossible.sum()} particles, the first in row {impossible.argmax()}, is larger than their "
            "spherical aberration, so it is no angle. Correct ctf/tilt_A and ctf/cs_mm in the table."
        )
    return np.arcsin(tilt / np.where(cs_A > 0, cs_A, 1)) * 1e3


def _group_names(exposures: list[int]) -> Iterable[str]:
    """Names after the exposure groups, numbered where one exposure group makes several."""
    total, so_far = Counter(exposures), Counter[int]()
    for exposure in exposures:
        so_far[exposure] += 1
        yield f"opticsGroup{exposure}" + (f"_{so_far[exposure]}" if total[exposure] > 1 else "")

"""The optics of particles as CryoLike keeps them: some for each particle, and one value of the others for a whole stack."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ctf import MICROSCOPE, require_optics
from ..errors import MixedParticlesError
from ..particles import STRETCH_ROWS, Particles

#: CryoLike reads an array of no elements as None; unlike None itself it needs no pickle.
_NONE = np.empty(0)


def require_stack_optics(particles: Particles, stack: int) -> None:
    """Find out whether CryoLike can have the optics of particles in stacks of so many.

    Raises
    ------
    TableError
        if they are not known
    MixedParticlesError
        naming the first stack whose particles differ in what CryoLike keeps once for all of them
    """
    first = 0
    for part in particles.stretches(max(1, STRETCH_ROWS // stack) * stack):
        shared = require_optics(part.ctf)[: len(MICROSCOPE)]
        if any((column != column[0]).any() for column in shared):
            _require_alike(part, stack, first)
        first += len(part)


def _require_alike(part: Particles, stack: int, first: int) -> None:
    """The same for particles that begin with row ``first`` of all, and with a stack."""
    for start in range(0, len(part), stack):
        chosen = part[start : start + stack]
        try:
            _shared_optics(chosen)
        except MixedParticlesError as error:
            row = first + start
            raise MixedParticlesError(
                f"CryoLike keeps one voltage, spherical aberration and amplitude contrast per stack; stack {row // stack} (rows {row} "
                f"to {row + len(chosen) - 1}) would need several. Export each exposure group to a folder of its own. {error}"
            ) from error


def _shared_optics(particles: Particles) -> list[np.float64]:
    return [np.float64(particles.one_value(f"ctf/{name}", "dataset.select({})")) for name in MICROSCOPE]


def stack_optics(particles: Particles) -> dict[str, Any]:
    """The optics of one stack under CryoLike's names, dtypes and units."""
    *_, u, v, angle = require_optics(particles.ctf)
    voltage, aberration, contrast = _shared_optics(particles)
    phase_shift = None if particles.ctf is None else particles.ctf.phase_shift_rad
    # CryoLike takes |U - V|: with U < V its astigmatism would be turned by 90 degrees. Swapped and turned, the CTF is the same.
    swap = u < v
    phase = np.zeros_like(u) if phase_shift is None else phase_shift
    paths = particles.blob_paths
    indexed = paths is not None
    used, file = np.unique(particles.file, return_inverse=True)
    names = np.array([] if paths is None else [paths[number].encode("utf-8", "surrogateescape") for number in used.tolist()])
    return {
        "defocusU": np.where(swap, v, u),
        "defocusV": np.where(swap, u, v),
        "defocusAngle": np.where(swap, angle + np.float32(np.pi / 2), angle),
        "phaseShift": phase,
        "sphericalAberration": aberration,
        "voltage": voltage,
        "amplitudeContrast": contrast,
        "angleRotation": _NONE,
        "angleTilt": _NONE,
        "anglePsi": _NONE,
        "ref_pixel_size": np.full(2, particles.pixel_size[0], np.float64) if indexed else _NONE,
        "files": names[file] if indexed else _NONE,
        "idxs": particles.slice.astype(np.uint32) if indexed else _NONE,
        "ctfBfactor": _NONE,
        "ctfScalefactor": _NONE,
        "n_images": np.int64(len(particles)),
    }

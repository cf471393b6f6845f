"""RELION's star files (3.1 and later) of particles: optics groups, image names, Euler angles and origins.

Angles are in degrees, origins in angstrom. RELION's defocus, astigmatism angle and origins have the signs of this package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ._relion_optics import OpticsGroups
from .ctf import DEFOCUS, Ctf
from .errors import ExportError, MissingDependencyError, TableError
from .files import Writable
from .particles import Particles

#: Rows of a block that are made text of at a time.
_ROWS = 1 << 14
# What ends a line, a value or the text itself for RELION or starfile; RELION takes several spaces for one, in quotes too.
_UNREADABLE = re.compile("[\0-\x1f\x85\u2028\u2029\ud800-\udfff\"'#]|  ")


def star_optics(parts: Iterable[Particles]) -> OpticsGroups:
    """The optics groups of particles that come in pieces, for ``optics_block`` and ``particle_block``.

    Raises
    ------
    TableError
        if voltage, spherical aberration, amplitude contrast or defocus are not known
    """
    half_sets: set[int] = set()

    def optics() -> Iterator[Ctf[np.ndarray]]:
        for part in parts:
            half_sets.update([] if part.half_set is None else np.unique(part.half_set).tolist())
            yield _optics_of(part)

    try:
        return replace(OpticsGroups.of(optics()), half_sets=frozenset(half_sets))
    except TableError as error:
        raise TableError(f"A star file needs the optics of the particles (voltage, Cs, amplitude contrast, defocus). {error}") from error


def _optics_of(particles: Particles) -> Ctf[np.ndarray]:
    ctf = Ctf[np.ndarray]() if particles.ctf is None else particles.ctf
    ctf.require(*DEFOCUS)
    return ctf


def optics_block(groups: OpticsGroups, *, box: int, pixel_size: float) -> dict[str, np.ndarray]:
    """The block ``optics`` of a star file: one row per optics group, columns by RELION's names.

    Beam tilt and anisotropic magnification are given here; trefoil, tetrafoil, beam shift and a beam tilt without spherical aberration
    are left out, with a warning where there are any.

    Parameters
    ----------
    groups : of all particles
    box : box of the images, pixels
    pixel_size : of the images, angstrom
    """
    groups.warn()
    images = {"rlnImagePixelSize": float(pixel_size), "rlnImageSize": box, "rlnImageDimensionality": 2}
    return groups.columns | {name: np.full(len(groups.columns["rlnOpticsGroup"]), value) for name, value in images.items()}


def particle_block(particles: Particles, groups: OpticsGroups, *, image_names: Sequence[str]) -> dict[str, np.ndarray]:
    """The block ``particles`` of a star file, or a piece of it: one row per particle, columns by RELION's names.

    What is not known of the particles has no column, and half sets have none where all particles are in one: RELION would refuse to refine
    such, but makes half sets itself where there are none.

    Parameters
    ----------
    particles : N rows; their own files, box and pixel size are not used
    groups : of all particles
    image_names : N names as RELION writes them (``000001@path/to/stack.mrcs``, which counts from 1)

    Raises
    ------
    ExportError
        if an image name cannot be written in a star file
    """
    bad = [name for name in image_names if _UNREADABLE.search(name)]
    if bad:
        raise ExportError(
            f"{len(bad)} image names cannot stand in a star file, the first is {bad[0]!r}: quotes, #, line breaks, tabs, double spaces and "
            "bytes that are no UTF-8 do not reach its readers as they are. Choose an output path and file names without them."
        )
    ctf = _optics_of(particles)
    u, v, axis = ctf.require(*DEFOCUS)
    found: dict[str, np.ndarray | None] = {
        "rlnImageName": np.array(image_names, object),
        "rlnOpticsGroup": groups.numbers(ctf),
        "rlnDefocusU": u,
        "rlnDefocusV": v,
        "rlnDefocusAngle": np.rad2deg(axis, dtype=np.float64),
        "rlnPhaseShift": None if ctf.phase_shift_rad is None else np.rad2deg(ctf.phase_shift_rad, dtype=np.float64),
        "rlnCtfBfactor": ctf.bfactor_A2,
        "rlnCtfScalefactor": ctf.scale,
    }
    if particles.pose is not None:
        found |= zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), euler_angles_deg(particles.pose).T, strict=True)
    if particles.shift_A is not None:
        found |= zip(("rlnOriginXAngst", "rlnOriginYAngst"), particles.shift_A.T, strict=True)
    if particles.half_set is not None and len(groups.half_sets) > 1:
        found["rlnRandomSubset"] = particles.half_set + 1
    return {name: column for name, column in found.items() if column is not None}


def euler_angles_deg(pose: np.ndarray) -> np.ndarray:
    """RELION's angles (rot, tilt, psi) of rotations: R = Rz(rot) Ry(tilt) Rz(psi), right-handed, about axes that turn along.

    By way of the unit quaternion (w, x, y, z), whose components are cos(tilt / 2) (cos s, sin s) for (w, z) and
    sin(tilt / 2) (sin d, cos d) for (x, y), with s, d = (psi + rot) / 2, (psi - rot) / 2: no angle loses digits near tilt 0 or
    180, where rot is 0, as RELION has it.

    Parameters
    ----------
    pose : (N, 3) rotation vectors, radian, of any length

    Returns
    -------
    (N, 3) float64, degrees; rot and psi from -180 to 180, tilt from 0 to 180
    """
    vector = np.asarray(pose, np.float64)
    angle = np.sqrt((vector**2).sum(axis=1))
    x, y, z = (vector * np.sinc(angle / (2 * np.pi))[:, None] / 2).T
    w = np.cos(angle / 2)
    across, along = np.hypot(x, y), np.hypot(w, z)
    half_sum, half_difference = np.arctan2(z, w), np.arctan2(x, y)
    # Rounding in float64 leaves this much where a component is zero; the angle of such a pair means nothing.
    half_difference = np.where(across < 1e-15, half_sum, half_difference)
    half_sum = np.where(along < 1e-15, half_difference, half_sum)
    rot, psi = np.rad2deg([half_sum - half_difference, half_sum + half_difference])
    angles = np.stack([rot, np.rad2deg(2 * np.arctan2(across, along)), psi], axis=1)
    wrapped: np.ndarray = angles - 360 * np.rint(angles / 360)
    return wrapped


#: Columns of equal length by name.
Columns = Mapping[str, np.ndarray]


def write_star(tables: Mapping[str, Columns | Iterable[Columns]], target: str | Path | Writable) -> None:
    """Write blocks of columns as a star file; the same blocks give the same bytes.

    Parameters
    ----------
    tables : blocks by name, each a dictionary of columns (``optics_block``), or one after the other the pieces of it (``particle_block``)
    target : a path, or a binary stream

    Raises
    ------
    MissingDependencyError
        if starfile is not installed
    """
    require_starfile()  # before anything is opened, and a file that is there lost
    with open(target, "wb") if isinstance(target, str | Path) else nullcontext(target) as stream:
        for block, columns in tables.items():
            for piece in _star_block(block, [columns] if isinstance(columns, Mapping) else columns):
                stream.write(piece.encode())


def _star_block(name: str, pieces: Iterable[Columns]) -> Iterator[str]:
    """The text of a block (at least one piece), some rows at a time: starfile holds many times what it writes."""
    starfile = require_starfile()
    import pandas

    def text(columns: Columns, rows: slice) -> str:
        frame = pandas.DataFrame({column: _decimal(values[rows]) for column, values in columns.items()})
        written: str = starfile.to_string({name: frame}, float_format="%.12g")
        # Above the first block starfile writes its version and the time.
        return written[written.index("data_") :]

    head = end = ""
    for columns in pieces:
        if not head:
            without_rows = text(columns, slice(0))
            head = without_rows.rstrip("\n") + "\n"
            end = without_rows[len(head) :]
            yield head
        for start in range(0, max(map(len, columns.values()), default=0), _ROWS):
            yield text(columns, slice(start, start + _ROWS))[len(head) :].removesuffix(end)
    yield end


def require_starfile() -> Any:
    """The package starfile, or a ``MissingDependencyError`` that says how to get it."""
    try:
        import starfile
    except ImportError as error:
        raise MissingDependencyError('Star files need starfile: pip install "cryolike-data[star]", or pass star=False.') from error
    return starfile


def _decimal(column: np.ndarray) -> np.ndarray:
    """Single precision as the numbers with the fewest digits that read back the same: 0.07, not 0.0700000003."""
    return column.astype("U").astype(np.float64) if column.dtype == np.float32 else column

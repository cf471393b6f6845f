"""CryoSPARC tables (``.cs``) of particles whose images were written anew; the counterpart of ``columns``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..files import Writable
from ..particles import Particles
from .columns import CTF_FIELDS


def table_of(particles: Particles, *, paths: Sequence[str], file: np.ndarray, image: np.ndarray, box: int, pixel_size: float) -> np.ndarray:
    """The table that CryoSPARC would write of particles whose images now lie elsewhere, in another box or pixel size.

    Only what is known of the particles becomes a column. Uids are taken over, zeros too: a table without uids does not get any.

    Parameters
    ----------
    particles : N rows; their own files, box and pixel size are not used
    paths : the new files, as ``blob/path`` shall name them; bytes that are no UTF-8 are kept (``surrogateescape``)
    file : (N,) integer, index into ``paths`` of each row
    image : (N,) integer, image inside that file, from 0
    box : box of the new images, pixels
    pixel_size : of the new images, angstrom; the shifts are given in pixels of this size

    Returns
    -------
    (N,) structured array with CryoSPARC's names and little-endian types: ``uid``, ``blob/*``, ``ctf/*`` and ``alignments3D/*``
    """
    encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
    names = np.array(encoded, f"S{max(map(len, encoded), default=1)}")
    columns: dict[str, tuple[Any, Any]] = {
        "uid": ("<u8", particles.uid),
        "blob/path": (names.dtype, names[file]),
        "blob/idx": ("<u4", image),
        "blob/shape": (("<u4", (2,)), box),
        "blob/psize_A": ("<f4", pixel_size),
    }
    if particles.sign is not None:
        columns["blob/sign"] = ("<f4", particles.sign)
    columns["blob/import_sig"] = ("<u8", 0)
    columns |= _optics(particles) | _alignments(particles, pixel_size)
    table = np.zeros(len(particles), [(name, np.dtype(dtype)) for name, (dtype, _) in columns.items()])
    for name, (_, values) in columns.items():
        table[name] = values
    return table


def save_table(pieces: Iterable[np.ndarray], rows: int, stream: Writable) -> None:
    """Write a table as CryoSPARC stores it: a NumPy file of a structured array, without Python objects.

    Parameters
    ----------
    pieces : of the table, at least one, one after the other
    rows : of all of them
    stream : where it goes
    """
    for number, piece in enumerate(pieces):
        if number == 0:
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, piece.dtype)) | {"shape": (rows,)}
            np.lib.format.write_array_header_1_0(stream, header)
        stream.write(piece.tobytes())


def _optics(particles: Particles) -> dict[str, tuple[Any, Any]]:
    if particles.ctf is None:
        return {}
    known = dict(particles.ctf.items())
    columns: dict[str, tuple[Any, Any]] = {"ctf/type": ("S8", b"imported")}
    for name, field in CTF_FIELDS.items():
        if name in known:
            number = "<u4" if name == "exposure_group" else "<f4"
            columns[field] = ((number, known[name].shape[1:]), known[name])
    return columns


def _alignments(particles: Particles, pixel_size: float) -> dict[str, tuple[Any, Any]]:
    columns: dict[str, tuple[Any, Any]] = {}
    if particles.half_set is not None:
        columns["alignments3D/split"] = ("<u4", particles.half_set)
    if particles.shift_A is not None:
        # By the pixel size as the table holds it, so that their product is the shift that was given.
        columns["alignments3D/shift"] = (("<f4", (2,)), particles.shift_A.astype(np.float64) / float(np.float32(pixel_size)))
    if particles.pose is not None:
        columns["alignments3D/pose"] = (("<f4", (3,)), particles.pose)
    return columns | {"alignments3D/psize_A": ("<f4", pixel_size)} if columns else {}

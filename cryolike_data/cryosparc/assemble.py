"""From a table and the stacks it points into to ``Particles``, with everything checked before the first image is read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arguments import square_pixel_size
from ..errors import StackError, TableError
from ..later import Later
from ..particles import Particles, shortest
from ..repeated import once, one_value_once, repeat
from ..stacks import Stacks
from .columns import Details, detail_names, read_sign, warn_of_poses_left_aside
from .table import Table

log = logging.getLogger(__name__)


def assemble(
    table: Table,
    blob: Table,
    pool: Stacks,
    file: np.ndarray,
    image: np.ndarray,
    needed: np.ndarray,
    *,
    blob_paths: Sequence[str] | None,
    pixel_size: Any,
    index_hint: str = "",
) -> Particles:
    """Particles whose row i is row i of the table and lies at ``image[i]`` of ``pool.paths[file[i]]``.

    ``blob`` holds the columns of the table that are needed now; the others are read when they are asked for. ``needed`` is what
    ``images_needed`` says.

    Raises
    ------
    StackError
        listing every file that is too short for its rows, not square, or of another size than the table says
    """
    if len(table) == 0:
        raise TableError(f"{table.path} has no rows.")
    problems = [*_missing_images(pool, file, image, needed, index_hint), *_wrong_shapes(pool, file, needed > 0, blob, pixel_size)]
    if problems:
        raise StackError("\n".join([f"{table.path} and its stacks do not fit together:", *(f"  {text}" for text in problems)]))
    sides = pool.of_headers(lambda header: header.nx).astype(np.int32)
    warn_of_poses_left_aside(table)
    later = Later(Details(table), by_rows=True)
    details: dict[str, Any] = dict.fromkeys(detail_names(table), later)
    return Particles(
        file=file.astype(np.int32, copy=False),
        slice=image.astype(np.int64, copy=False),
        box=_spread(sides, file),
        pixel_size=_pixel_sizes(blob, pool, file, pixel_size),
        paths=pool.paths,
        blob_paths=None if blob_paths is None else tuple(blob_paths),
        sign=read_sign(blob),
        **details,
    )


def _missing_images(pool: Stacks, file: np.ndarray, image: np.ndarray, needed: np.ndarray, index_hint: str) -> list[str]:
    if image.min() >= 0 and (needed <= pool.counts).all():
        return []
    bad = np.flatnonzero((image < 0) | (image >= pool.counts[file]))
    told: list[str] = []
    for number in np.unique(file[bad]).tolist():
        rows = bad[file[bad] == number]
        header, path = pool.headers[number], pool.paths[number]
        if (image[rows] < 0).any():
            told.append(f"{path}: image {image[rows].min()} is asked for ({len(rows)} rows); images count from 0{index_hint}")
        elif (last := image[rows].max()) >= header.nz:
            # Numbers that count from 1 run over by one image.
            hint = index_hint if last == header.nz else ""
            told.append(
                f"{path} has {header.nz} images, 0 to {header.nz - 1}; image {last} is asked for "
                f"({len(rows)} rows, first row {rows[0]}){hint}"
            )
        else:
            told.append(f"{path} is truncated: {header.n_complete} of {header.nz} images are complete; {len(rows)} rows need later ones")
    return told


def _spread(of_file: np.ndarray, file: np.ndarray) -> np.ndarray:
    """What is known of each file, for each particle."""
    spread: np.ndarray = of_file[file] if (of_file != of_file[0]).any() else repeat(of_file[:1], len(file))
    return spread


def _wrong_shapes(pool: Stacks, file: np.ndarray, used: np.ndarray, table: Table, pixel_size: Any) -> list[str]:
    sides = pool.of_headers(lambda header: (header.ny, header.nx))
    told = [
        f"{pool.paths[number]} holds images of {sides[number, 1]} x {sides[number, 0]} pixels; particles have to be square"
        for number in np.flatnonzero(used & (sides[:, 0] != sides[:, 1])).tolist()
    ]
    if "blob/shape" not in table:
        return told
    stated = table["blob/shape"]
    found = _spread(sides.astype(stated.dtype), file)
    # Column by column, because NumPy is slow along an axis of two.
    if all((once(stated[:, side]) == once(found[:, side])).all() for side in (0, 1)):
        return told
    differ = np.flatnonzero((stated != found).any(axis=1))
    if len(differ) and pixel_size is not None:
        log.warning("blob/shape of %s differs from the stacks in %d rows; the stacks are believed.", table.path, len(differ))
        return told
    holds, remedy = ("holds", "if the stacks were resampled, pass their pixel_size")
    if not pool.headers_read:
        holds, remedy = "is expected to hold, as the first stack does,", "pass check_headers=True to look at each stack"
    for number in np.unique(file[differ]).tolist():
        rows = differ[file[differ] == number]
        (ny, nx), header = stated[rows[0]], pool.headers[number]
        told.append(
            f"{pool.paths[number]} {holds} images of {header.nx} x {header.ny} pixels and blob/shape says {nx} x {ny} "
            f"({len(rows)} rows); {remedy}"
        )
    return told


def _pixel_sizes(table: Table, pool: Stacks, file: np.ndarray, argument: Any) -> np.ndarray:
    """The argument, else blob/psize_A, else (row by row) the MRC headers where plausible; NaN where none says it."""
    stated = table.get("blob/psize_A")
    known = np.zeros(0, bool) if stated is None else (once(stated) > 0) & (once(stated) < np.inf)
    if argument is not None:
        given = square_pixel_size(argument)
        if stated is not None and not np.allclose(others := once(stated)[known], given, rtol=1e-3):
            log.warning("pixel_size=%g is used; %s says %s in blob/psize_A.", given, table.path, shortest(others[0]))
        return repeat(np.array([given]), len(table))
    if stated is not None and known.all():
        return one_value_once(stated)
    of_header = np.array([np.nan if header.pixel_size is None else header.pixel_size for header in pool.headers], np.float32)
    sizes = _spread(of_header, file)
    if stated is not None:
        known = np.broadcast_to(known, len(table))
        log.warning(
            "blob/psize_A of %s is no size in %d of %d rows; there the MRC headers are asked.", table.path, (~known).sum(), len(table)
        )
        return np.where(known, stated, sizes)
    if not np.isnan(sizes[0]):
        log.info("The pixel size is taken from the MRC headers (%s A).", shortest(sizes[0]))
    return sizes

"""``ZarrDataset``: the particles of a store that ``export_zarr`` wrote, as lazy as those of the original stacks."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .ctf import Ctf
from .dataset import ParticleDataset
from .errors import ExportError, StackError
from .later import Later, take_rows_of
from .mrc import StackHeader
from .particles import Particles, Selection
from .shard import REMEDY, remedy_of
from .stacks import ImageSource
from .zarr_images import ZarrImages
from .zarr_layout import layout_of, open_files, require_all_keys
from .zarr_store import Stamp, absolute, is_url, open_group, require_same, stamp_of

if TYPE_CHECKING:
    import zarr

_COLUMNS = ("row", "uid", "pose", "shift_A", "half_set", "sign")
#: Threads that read columns.
_THREADS = 8


class ZarrDataset(ParticleDataset):
    """The particles of a Zarr store written by ``export_zarr``. Row i of the store is item i.

    Images of an uncompressed store in a local folder are read as those of MRC files are; others are read through zarr. Columns
    are read when they are asked for.

    Parameters
    ----------
    store : the folder, or a URL (``s3://bucket/particles.zarr``)
    select : which rows to take: a mask, row numbers, a slice, or a function of the particles

    Raises
    ------
    MissingStackError
        if there is no such folder
    StackError
        if it is not such a store, or listing every file of images that is missing, damaged or cut short
    MissingDependencyError
        if a package for this kind of URL is not installed
    """

    def __init__(self, store: str | os.PathLike[str], *, select: Selection = None) -> None:
        location = absolute(store)
        stamp = stamp_of(location)
        try:
            group, layout = open_group(location)
        except StackError as error:
            if isinstance(error.__cause__, OSError | KeyError | ValueError) and (unfinished := _unfinished_export(location)):
                raise StackError(f"{location} is {unfinished}.") from error
            raise
        images = cast("zarr.Array[Any]", group["images"])
        try:
            box, pixel_size = int(layout["box"]), float(layout["pixel_size_A"])
        except (KeyError, TypeError, ValueError) as error:
            raise StackError(f"{location} does not say of which box and pixel size its images are. {REMEDY}") from error
        n = images.shape[0]
        if images.shape != (n, box, box):
            raise StackError(f"{location} speaks of images of {box} x {box} pixels and holds an array of {images.shape}. Export it again.")
        source, paths, file, image = _open_source(location, images, pixel_size, stamp)
        columns: dict[str, Any] = dict.fromkeys((*_COLUMNS, "ctf"), Later(partial(_read_columns, location, n, stamp)))
        particles = Particles(
            file=file,
            slice=image,
            box=np.broadcast_to(np.int32(box), n),
            pixel_size=np.broadcast_to(pixel_size, n),
            paths=paths,
            **columns,
        )
        super().__init__(particles, source, select=select)
        self.tables = (location,)


def _open_source(
    location: str, images: zarr.Array[Any], pixel_size: float, stamp: Stamp
) -> tuple[ImageSource, tuple[str, ...], np.ndarray, np.ndarray]:
    """What reads the images; the files it reads; and the file and the place in it of each image."""
    layout = None if is_url(location) else layout_of(images)
    if layout is None:
        require_all_keys(location, images)
    else:
        found = open_files(location, images, layout, pixel_size, partial(_require_same_store, location, stamp))
        if found is not None:
            return found[0], found[0].paths, found[1], found[2]
    n = images.shape[0]
    source = ZarrImages(location, np.dtype(images.dtype).newbyteorder("="), stamp)
    return source, (location,), np.zeros(n, np.int32), np.arange(n, dtype=np.int64)


def _read_columns(location: str, n: int, stamp: Stamp, rows: np.ndarray | None) -> dict[str, Any]:
    """All columns of a store of n particles, or these rows of them, by their names in ``Particles``, None for those that it lacks."""
    require_same(location, stamp)
    group, _ = open_group(location)
    optics = [field.name for field in fields(Ctf)]
    names = [*_COLUMNS, *(f"ctf/{name}" for name in optics)]
    with ThreadPoolExecutor(_THREADS) as threads:
        columns = dict(zip(names, threads.map(partial(_read_column, location, group, n), names), strict=True))
    promised = {"row", "uid"} | _written_arrays(location, group)
    lost = [name for name, column in columns.items() if column is None and name in promised]
    if lost:
        raise StackError(f"{location} lacks {', '.join(lost)} of its {n} particles. {REMEDY}")
    ctf = Ctf(**{name: columns[f"ctf/{name}"] for name in optics})
    found = {name: columns[name] for name in _COLUMNS} | {"ctf": ctf if ctf.items() else None}
    return {name: take_rows_of(column, rows) for name, column in found.items()}


def _read_column(location: str, group: zarr.Group, n: int, name: str) -> np.ndarray | None:
    """A column of n particles, or None where the store has none of that name."""
    try:
        array: Any = group[name]
        if array.shape[0] != n:
            raise StackError(f"{location} lacks {name} of its {n} particles. {REMEDY}")
        require_all_keys(location, array)
        return np.asarray(array[:])
    except KeyError:
        return None
    except StackError:
        raise
    except Exception as error:  # of zarr, of a codec, or of the library for this kind of URL
        raise StackError(f"{name} of {location} cannot be read: {error}.{remedy_of(error)}") from error


def _written_arrays(location: str, group: zarr.Group) -> set[str]:
    """The arrays that the export wrote beside the images, by its manifest; a store that is copied in part may lack some."""
    try:
        attributes: Any = group["source"].attrs.asdict()
        return {file["name"].removesuffix("/zarr.json") for file in attributes["export"]["rest"]}
    except KeyError:
        return set()
    except Exception as error:  # as above
        raise StackError(f"The manifest of {location} cannot be read: {error}.{remedy_of(error)}") from error


def _require_same_store(location: str, stamp: Stamp, path: str, header: StackHeader) -> None:
    require_same(location, stamp)


def _unfinished_export(location: str) -> str | None:
    """What to say of an export to this place that is at work or was stopped; None if there is no trace of one."""
    from .export.place import open_place
    from .export.state import describe_unfinished

    with suppress(ExportError):  # what is closed to this user says nothing of an export
        return describe_unfinished(open_place(location))
    return None

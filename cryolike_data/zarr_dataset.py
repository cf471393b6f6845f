"""``ZarrDataset``: the particles of a store that ``export_zarr`` wrote, as lazy as those of the original stacks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .ctf import Ctf
from .dataset import ParticleDataset
from .errors import MissingStackError, StackError
from .export.zarr import FORMAT
from .particles import Particles, Selection


class ZarrDataset(ParticleDataset):
    """The particles of a Zarr store written by ``export_zarr``. Row i of the store is item i.

    Parameters
    ----------
    store : the folder
    select : which rows to take: a mask, row numbers, a slice, or a function of the particles

    Raises
    ------
    MissingStackError
        if there is no such folder
    StackError
        if it is not such a store
    """

    def __init__(self, store: str | os.PathLike[str], *, select: Selection = None) -> None:
        path = Path(store).expanduser().absolute()
        group = _open(path)
        source = ZarrImages(str(path))
        super().__init__(_read_particles(path, group), source, select=select)


class ZarrImages:
    """The images of one store, read through zarr in whole inner chunks. Pickles as its path."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._array = _open(Path(path))["images"]
        _require_all_shards(path, self._array)
        self.dtype: np.dtype[Any] = np.dtype(self._array.dtype).newbyteorder("=")

    def locate(self, file: np.ndarray, image: np.ndarray) -> ZarrRows:
        """The images of a table whose row k is image ``image[k]`` of the store."""
        return ZarrRows(self, image)

    def read_into(self, image: np.ndarray, out: np.ndarray) -> None:
        """Copy image ``image[k]`` into ``out[k]`` for all k; each inner chunk is read once."""
        size = int(self._array.chunks[0])
        order = np.argsort(image, kind="stable")
        chunk = image[order] // size
        cuts = np.flatnonzero(np.diff(chunk)) + 1
        for rows in np.split(order, cuts) if len(order) else []:
            first, last = int(image[rows[0]]), int(image[rows[-1]]) + 1
            try:
                out[rows] = self._array[first:last][image[rows] - first]
            except (ValueError, OSError) as error:
                raise StackError(f"Images {first} to {last - 1} of {self.path} cannot be read, copy or export it again: {error}") from error

    def __reduce__(self) -> tuple[type[ZarrImages], tuple[str]]:
        return ZarrImages, (self.path,)


class ZarrRows:
    """The images of a table's rows in a store."""

    def __init__(self, store: ZarrImages, image: np.ndarray) -> None:
        self._store, self._image = store, image

    def read_into(self, rows: np.ndarray, out: Tensor) -> None:
        """Copy the images of these rows into ``out``, (B, H, W) contiguous."""
        self._store.read_into(self._image[rows], out.numpy())

    def ask_ahead(self, rows: np.ndarray) -> bool:
        """Nothing to do: zarr opens and reads what it needs by itself."""
        return False


def _open(path: Path) -> Any:
    import zarr

    if not path.is_dir():
        raise MissingStackError(f"There is no Zarr store {path}.")
    try:
        group = zarr.open_group(str(path), mode="r")
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise StackError(f"{path} is not a Zarr store: {error}") from error
    layout = dict(group.attrs).get("cryolike_data")
    if not isinstance(layout, dict) or "images" not in group:
        raise StackError(f"{path} was not written by cryolike_data.export_zarr; open it with zarr itself.")
    if layout.get("format") != FORMAT:
        raise StackError(f"{path} has layout {layout.get('format')}; this version of cryolike_data reads layout {FORMAT}. Upgrade it.")
    return group


def _require_all_shards(path: str, images: Any) -> None:
    """Zarr takes a file that is not there for one of zeros."""
    shard = (images.shards or images.chunks)[0]
    missing = [k for k in range(-(-images.shape[0] // shard)) if not Path(path, "images", "c", str(k), "0", "0").is_file()]
    if missing:
        raise StackError(f"{path} lacks {len(missing)} of its shards (first: images/c/{missing[0]}/0/0); copy or export it again.")


def _read_particles(path: Path, group: Any) -> Particles:
    layout = group.attrs["cryolike_data"]
    n = int(group["images"].shape[0])
    ctf: dict[str, Any] = {name: array[:] for name, array in group["ctf"].arrays()} if "ctf" in group else {}
    optional = {name: group[name][:] for name in ("pose", "shift_A", "half_set", "sign") if name in group}
    return Particles(
        row=group["row"][:],
        uid=group["uid"][:],
        file=np.zeros(n, np.int32),
        slice=np.arange(n, dtype=np.int64),
        box=np.full(n, int(layout["box"]), np.int32),
        pixel_size=np.full(n, float(layout["pixel_size_A"])),
        paths=(str(path),),
        ctf=Ctf(**ctf) if ctf else None,
        **optional,
    )

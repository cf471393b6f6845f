"""A Zarr v3 store of particles: images in large uncompressed shards, one array per column, units and provenance beside them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from ..collate import Collate
from ..dataset import ParticleDataset
from ..errors import ArgumentError, ExportError
from ..files import whole_folder
from ..transforms import Downsample

if TYPE_CHECKING:
    import zarr

#: Version of the layout, in the attribute ``cryolike_data/format``.
FORMAT = 1
#: An inner chunk is what other readers fetch at a time; a shard is one file, written whole.
_CHUNK_BYTES = 2 << 20
_SHARD_BYTES = 256 << 20
_COLUMN_ROWS = 1 << 20
#: Images that are read and transformed at a time.
_READ_BYTES = 64 << 20
_DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}

_UNITS = {
    "pose": "radian",
    "shift_A": "angstrom",
    "ctf/voltage_kv": "kilovolt",
    "ctf/spherical_aberration_mm": "millimeter",
    "ctf/defocus_u": "angstrom",
    "ctf/defocus_v": "angstrom",
    "ctf/astigmatism_angle_rad": "radian",
    "ctf/phase_shift_rad": "radian",
    "ctf/bfactor_A2": "angstrom^2",
    "ctf/beam_shift_A": "angstrom",
    "ctf/tilt_A": "angstrom",
    "ctf/trefoil_A": "angstrom",
    "ctf/tetrafoil_A": "angstrom",
}
_AXES = {"pose": "rotation_vector", "shift_A": "xy", "ctf/beam_shift_A": "xy", "ctf/tilt_A": "xy", "ctf/trefoil_A": "xy"}


def export_zarr(
    dataset: ParticleDataset,
    store: str | os.PathLike[str],
    *,
    downsample: Downsample | None = None,
    dtype: str | torch.dtype | None = None,
    shard_bytes: int = _SHARD_BYTES,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Path:
    """Write the particles, in the order of the data set, as a Zarr v3 group.

    ``images`` is (N, D, D) in uncompressed shards; ``uid``, ``row``, ``pose``, ``shift_A``, ``half_set`` and ``sign`` are arrays
    beside it, optics are in the group ``ctf``, and where each image came from is in the group ``source``. The store appears
    whole or not at all. ``ZarrDataset`` reads it back; so do zarr-python, xarray and any other reader of Zarr v3.

    Parameters
    ----------
    dataset : the particles
    store : the folder to write, by custom ending in ``.zarr``
    downsample : how to make the images smaller
    dtype : "float16", "float32" or "float64"; by default that of the files, or float32 after downsampling
    shard_bytes : size of one file, about
    overwrite : replace what is there
    progress : show a progress bar; by default on a terminal only

    Returns
    -------
    The path of the store.
    """
    import zarr

    if "://" in str(store):
        raise ArgumentError(f"{store} is a URL; stores are written to local folders only")
    path = Path(store).expanduser()
    if len(dataset) == 0:
        raise ArgumentError("There are no particles to export: the selection is empty.")
    torch_type = _output_dtype(dataset, downsample, dtype)
    collate = None if torch_type is None else Collate(downsample=downsample, dtype=torch_type)
    box = dataset.box if downsample is None else downsample.output_box(dataset.box)
    numpy_type = dataset.source.dtype if torch_type is None else np.dtype(str(torch_type).removeprefix("torch."))
    chunk, shard = _layout(len(dataset), box * box * numpy_type.itemsize, shard_bytes)
    with whole_folder(path, overwrite=overwrite, replaceable=lambda place: (place / "zarr.json").is_file()) as partial:
        root = zarr.create_group(str(partial), zarr_format=3, attributes=_attributes(dataset, box, downsample))
        images = root.create_array(
            "images",
            shape=(len(dataset), box, box),
            dtype=numpy_type,
            chunks=(chunk, box, box),
            shards=(shard, box, box),
            compressors=None,
            filters=None,
            dimension_names=("particle", "y", "x"),
            attributes={"pixel_size_A": dataset.pixel_size * dataset.box / box},
            config={"write_empty_chunks": True},
        )
        with tqdm(total=len(dataset), unit="image", desc=path.name, disable=None if progress is None else not progress) as bar:
            _write_images(dataset, images, collate, shard, bar.update)
        _write_columns(dataset, root)
    return path


def _output_dtype(dataset: ParticleDataset, downsample: Downsample | None, dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype to convert to, or None to keep the bytes of the files."""
    if dtype is None:
        return None if downsample is None else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ArgumentError(f"dtype is one of {', '.join(_DTYPES)}, or None for that of the files, not {dtype!r}")
    return None if downsample is None and dataset.dtype == _DTYPES[name] else _DTYPES[name]


def _layout(n: int, image_bytes: int, shard_bytes: int) -> tuple[int, int]:
    """Images per inner chunk and per shard; a shard holds whole chunks, and never more of them than there are images."""
    if shard_bytes < 1:
        raise ArgumentError(f"shard_bytes is a positive number of bytes, not {shard_bytes}")
    chunk = max(1, min(_CHUNK_BYTES, shard_bytes) // image_bytes)
    # Evened out over the images, because the last chunk is stored at full size.
    chunk = -(-n // -(-n // chunk))
    chunks = max(1, min(shard_bytes // (chunk * image_bytes), -(-n // chunk)))
    return chunk, chunk * chunks


def _attributes(dataset: ParticleDataset, box: int, downsample: Downsample | None) -> dict[str, Any]:
    from .. import __version__

    return {
        "cryolike_data": {
            "format": FORMAT,
            "version": __version__,
            "box": box,
            "pixel_size_A": dataset.pixel_size * dataset.box / box,
            "source": {"kind": type(dataset).__name__, "box": dataset.box, "pixel_size_A": dataset.pixel_size},
            "downsample": None if downsample is None else asdict(downsample),
        }
    }


def _write_images(
    dataset: ParticleDataset, images: zarr.Array[Any], collate: Collate | None, shard: int, advance: Callable[[int], object]
) -> None:
    """One shard at a time into one buffer, so that every file is written once and whole."""
    buffer = np.empty((min(shard, len(dataset)), *images.shape[1:]), images.dtype)
    step = max(1, _READ_BYTES // dataset.image_bytes)
    for first in range(0, len(dataset), shard):
        last = min(first + shard, len(dataset))
        for start in range(first, last, step):
            rows = np.arange(start, min(start + step, last))
            read = dataset.read(rows)
            pixels = read if collate is None else collate.process_images(read)
            if pixels.dtype == torch.float16 and (pixels.isinf().flatten(1).any(1) & read.float().isfinite().flatten(1).all(1)).any():
                raise ExportError("Some pixels are larger than float16 can hold (65504); normalize them, or export float32.")
            buffer[start - first : start - first + len(rows)] = pixels.numpy()
            advance(len(rows))
        images[first:last] = buffer[: last - first]


def _write_columns(dataset: ParticleDataset, root: zarr.Group) -> None:
    particles = dataset.particles
    columns = {name: column for name, column in particles.columns().items() if name not in ("box", "pixel_size", "file", "slice")}
    columns |= {"source/file": particles.file, "source/image": particles.slice}
    for name, column in columns.items():
        rest = [_AXES.get(name, f"{Path(name).name}_term")] if column.ndim == 2 else []
        array = root.create_array(
            name,
            shape=column.shape,
            dtype=column.dtype,
            chunks=(max(1, min(len(column), _COLUMN_ROWS)), *column.shape[1:]),
            compressors=None,
            filters=None,
            dimension_names=("particle", *rest),
            attributes={"units": _UNITS[name]} if name in _UNITS else {},
            config={"write_empty_chunks": True},
        )
        array[:] = column
    root["source"].attrs.update(
        {"paths": list(particles.paths), "blob_paths": None if particles.blob_paths is None else list(particles.blob_paths)}
    )

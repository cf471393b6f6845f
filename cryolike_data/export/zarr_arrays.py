"""What zarr stores of arrays and groups, made in memory: keys and bytes, which a place then writes whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

Compression = Literal["zstd", "blosc"]

_COLUMN_ROWS = 1 << 20

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


def encode(name: str, array: dict[str, Any], data: np.ndarray | None = None) -> Iterator[tuple[str, bytes]]:
    """What zarr stores of an array, in memory: (key, bytes), the metadata last."""
    import zarr

    kept: dict[str, Any] = {}
    made = zarr.create_array(
        zarr.storage.MemoryStore(kept), name=name, zarr_format=3, config={"write_empty_chunks": True}, filters=None, **array
    )
    if data is not None:
        made[:] = data
    for key in sorted(kept, key=lambda key: key.endswith("zarr.json")):
        if key.startswith(f"{name}/"):
            yield key, kept[key].to_bytes()


def column_array(name: str, column: np.ndarray) -> dict[str, Any]:
    """How zarr makes the array of a column of particles."""
    rest = [_AXES.get(name, f"{Path(name).name}_term")] if column.ndim == 2 else []
    return {
        "shape": column.shape,
        "dtype": column.dtype,
        "chunks": (max(1, min(len(column), _COLUMN_ROWS)), *column.shape[1:]),
        "compressors": None,
        "dimension_names": ("particle", *rest),
        "attributes": {"units": _UNITS[name]} if name in _UNITS else {},
    }


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """The metadata of a group."""
    return json.dumps({"attributes": attributes, "zarr_format": 3, "node_type": "group"}, indent=1).encode()


def compressor(compression: Compression | None, itemsize: int) -> Any:
    """What zarr compresses pixels of so many bytes with."""
    if compression is None:
        return None
    from zarr.codecs import BloscCodec, ZstdCodec

    return ZstdCodec(level=3) if compression == "zstd" else BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle", typesize=itemsize)

"""Writing CryoSPARC tables and MRC stacks in tests, by other means than the package under test."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

SHARED = Path(__file__).resolve().parents[2] / "shared"

MODES = {"i1": 0, "u1": 0, "i2": 1, "f4": 2, "u2": 6, "f2": 12}

CTF_FIELDS = {
    "ctf/exp_group_id": "<u4",
    "ctf/accel_kv": "<f4",
    "ctf/cs_mm": "<f4",
    "ctf/amp_contrast": "<f4",
    "ctf/df1_A": "<f4",
    "ctf/df2_A": "<f4",
    "ctf/df_angle_rad": "<f4",
    "ctf/phase_shift_rad": "<f4",
}


def write_stack(
    path: Path,
    images: np.ndarray,
    *,
    order: str = "<",
    extended: int = 0,
    pixel_size: float = 0.0,
    stamp: bytes | None = None,
    map_word: bytes = b"MAP ",
    nz: int | None = None,
    imod_flags: int | None = None,
) -> Path:
    """Write (N, H, W) images as an MRC stack, byte by byte, with whatever oddity a test asks for."""
    n, ny, nx = images.shape
    header = bytearray(1024)
    struct.pack_into(f"{order}4i", header, 0, nx, ny, n if nz is None else nz, MODES[images.dtype.str[1:]])
    struct.pack_into(f"{order}3i", header, 28, nx, ny, n)
    struct.pack_into(f"{order}3f", header, 40, nx * pixel_size, ny * pixel_size, n * pixel_size)
    struct.pack_into(f"{order}i", header, 92, extended)
    header[208:212] = map_word
    header[212:216] = stamp if stamp is not None else (b"\x44\x44\0\0" if order == "<" else b"\x11\x11\0\0")
    if imod_flags is not None:
        struct.pack_into(f"{order}2i", header, 152, 1146047817, imod_flags)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(header) + b"\xab" * extended + images.astype(images.dtype.newbyteorder(order)).tobytes())
    return path


def write_table(path: Path, **columns: Any) -> Path:
    """Write a CryoSPARC table; ``blob__path=[...]`` becomes column ``blob/path``, strings become bytes."""
    arrays: dict[str, np.ndarray] = {}
    for name, values in columns.items():
        array = np.asarray(values)
        arrays[name.replace("__", "/")] = np.char.encode(array, "utf-8") if array.dtype.kind == "U" else array
    n = len(next(iter(arrays.values())))
    table = np.zeros(n, [(name, array.dtype, array.shape[1:]) for name, array in arrays.items()])
    for name, array in arrays.items():
        table[name] = array
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.save(file, table, allow_pickle=False)
    return path


def ctf_columns(n: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Columns ``ctf__...`` of n particles of one exposure group, for ``write_table``."""
    rng = np.random.default_rng(seed)
    u = rng.uniform(10000, 20000, n)
    values = {
        "ctf/exp_group_id": np.zeros(n),
        "ctf/accel_kv": np.full(n, 300.0),
        "ctf/cs_mm": np.full(n, 2.7),
        "ctf/amp_contrast": np.full(n, 0.1),
        "ctf/df1_A": u,
        "ctf/df2_A": u - rng.uniform(0, 1000, n),
        "ctf/df_angle_rad": rng.uniform(-1.5, 1.5, n),
        "ctf/phase_shift_rad": np.zeros(n),
    }
    return {name.replace("/", "__"): value.astype(CTF_FIELDS[name]) for name, value in values.items()}


def uids(n: int, *, seed: int = 0) -> np.ndarray:
    """n different uids, half of them beyond 2**63."""
    return np.random.default_rng([7, seed]).integers(1, 2**64, n, dtype=np.uint64)


def numbered_images(n: int, box: int, *, dtype: str = "f4", start: int = 0) -> np.ndarray:
    """n images that differ everywhere, so that any mix-up of images, rows or columns shows."""
    rng = np.random.default_rng([11, start, n, box])
    if np.dtype(dtype).kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, (n, box, box), dtype=dtype, endpoint=True)
    return rng.normal(size=(n, box, box)).astype(dtype)

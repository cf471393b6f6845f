"""Tables and image stacks as CryoSPARC lays them out, for the demo project: random particle tables, ``.cs`` files and MRC stacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
from numpy.typing import NDArray

from .cryosparc.write import save_table as write_table
from .mrc import HEADER_BYTES

_OPTICS = {0: (300.0, 2.7, 0.10), 3: (200.0, 1.4, 0.07)}  # exposure group: kV, Cs in mm, amplitude contrast
MRC_MODES = {"float32": 2, "float16": 12}
FIELDS = {
    "blob": "path:S99 idx:u4 shape:2u4 psize_A:f4 sign:f4 import_sig:u8",
    "ctf": "type:S9 exp_group_id:u4 accel_kv:f4 cs_mm:f4 amp_contrast:f4 df1_A:f4 df2_A:f4 df_angle_rad:f4 phase_shift_rad:f4 scale:f4 "
    "scale_const:f4 shift_A:2f4 tilt_A:2f4 trefoil_A:2f4 tetra_A:4f4 anisomag:4f4 bfactor:f4",
    "alignments3D": "split:u4 shift:2f4 pose:3f4 psize_A:f4 alpha:f4",
}
_Reader = Callable[[NDArray[np.int64]], NDArray[Any]]
_CHUNK_PIXELS = 2**21  # pixels worked on at a time: memory does not grow with the number of particles


def random_places(rng: np.random.Generator, n: int, n_stacks: int) -> tuple[list[int], NDArray[np.int64], NDArray[np.int64]]:
    """Sizes of the stacks, and stack and slice of each of the n particles, in random order and with unused slices between."""
    unused = max(1, n // 10)
    weights = np.arange(n_stacks - 1, 0, -1)
    sizes = 1 + (n + unused - n_stacks) * weights // weights.sum()
    sizes[0] += n + unused - 1 - sizes.sum()
    sizes = np.append(sizes, 1)
    stack = np.repeat(np.arange(n_stacks), sizes)
    idx = np.arange(n + unused) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # The very first slice stays unused, so that there is always a gap; the first slice of the other stacks is always used.
    dropped = np.append(rng.choice(np.flatnonzero(idx), unused - 1, replace=False), 0)
    kept = rng.permutation(np.setdiff1d(np.arange(n + unused), dropped))
    return sizes.tolist(), stack[kept], idx[kept]


def random_particles(rng: np.random.Generator, stack: NDArray[np.int64], box: int, pixel_size: float) -> NDArray[Any]:
    """A table with all columns but blob filled in; optics and mean defocus go with the stack, as they do with a micrograph."""
    n, n_stacks = len(stack), int(stack.max()) + 1
    columns = [(slot, *field.split(":")) for slot, fields in FIELDS.items() for field in fields.split()]
    table = np.zeros(n, [("uid", "u8"), *((f"{slot}/{name}", kind) for slot, name, kind in columns)])
    groups = np.array(list(_OPTICS))[stack % len(_OPTICS)]
    table["uid"], table["ctf/type"], table["ctf/exp_group_id"] = random_uids(rng, n), b"spline", groups
    table["ctf/accel_kv"], table["ctf/cs_mm"], table["ctf/amp_contrast"] = np.array([_OPTICS[g] for g in groups.tolist()]).T
    defocus = rng.uniform(8000, 18000, n_stacks)[stack] + rng.normal(0, 300, n)
    astigmatism = rng.uniform(100, 800, n_stacks)[stack]
    table["ctf/df1_A"], table["ctf/df2_A"] = defocus + astigmatism / 2, defocus - astigmatism / 2
    table["ctf/df_angle_rad"] = rng.uniform(-np.pi / 2, np.pi / 2, n_stacks)[stack]
    table["ctf/scale"] = table["ctf/scale_const"] = table["alignments3D/alpha"] = 1
    table["alignments3D/split"] = rng.integers(0, 2, n)
    table["alignments3D/shift"] = rng.uniform(-box / 20, box / 20, (n, 2))
    quaternion = rng.normal(size=(n, 4))  # a normal quaternion is a uniform rotation
    sine = np.linalg.norm(quaternion[:, 1:], axis=1)
    angle = 2 * np.arctan2(sine, np.abs(quaternion[:, 0]))
    table["alignments3D/pose"] = quaternion[:, 1:] * (angle * np.sign(quaternion[:, 0]) / sine)[:, None]
    table["alignments3D/psize_A"] = pixel_size
    return table


def set_blob(table: NDArray[Any], paths: Sequence[str], idx: Sequence[int] | NDArray[np.int64], box: int, pixel_size: float) -> None:
    """Fill in the blob columns, in place; idx counts from 0."""
    table["blob/path"], table["blob/idx"], table["blob/shape"] = paths, idx, box
    table["blob/psize_A"], table["blob/sign"] = pixel_size, -1


def save_table(path: Path, table: NDArray[Any], *slots: str) -> None:
    """Write uid and the columns of the given slots as CryoSPARC does, every string column as wide as its longest entry."""
    names = [name for name in table.dtype.names or () if name.partition("/")[0] in ("uid", *slots)]
    columns = {name: np.array(table[name].tolist()) if table.dtype[name].kind == "S" else table[name] for name in names}
    kept = np.zeros(len(table), [(name, column.dtype, column.shape[1:]) for name, column in columns.items()])
    for name, column in columns.items():
        kept[name] = column
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        write_table([kept], len(kept), file)


def write_batches(
    folder: Path, pattern: str, rows: NDArray[np.int64], read: _Reader, dtype: str, box: int, pixel_size: float
) -> tuple[list[str], list[int]]:
    """Write the images of the rows, in that order, as three numbered stacks; path and slice of each."""
    paths: list[str] = []
    places: list[int] = []
    size = math.ceil(len(rows) / 2.5)  # so that the last stack is shorter
    for k, start in enumerate(range(0, len(rows), size)):
        batch = rows[start : start + size]
        chunks = (read(batch[part]) for part in chunks_of(len(batch), box))
        write_mrc(folder / pattern.format(k), (len(batch), box, box), dtype, pixel_size, chunks, is_stack=True)
        paths += [pattern.format(k)] * len(batch)
        places += range(len(batch))
    return paths, places


def write_mrc(
    path: Path, shape: tuple[int, ...], dtype: str, pixel_size: float, chunks: Iterable[NDArray[Any]], is_stack: bool = False
) -> None:
    """Write an image stack (ispg 0) or a volume chunk by chunk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new_mmap(path, shape, MRC_MODES[dtype]) as mrc, path.open("r+b") as file:
        if is_stack:
            mrc.set_image_stack()
        mrc.voxel_size = pixel_size
        # Not by way of the map, which a full disk turns into an error that ends the process.
        file.seek(HEADER_BYTES)
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, mrc.data.dtype).data)
        file.flush()
        mrc.update_header_stats()
        mrc.header.label[0] = "cryolike_data demo project"  # in place of mrcfile's, which holds the time of writing


def chunks_of(n: int, box: int) -> list[slice]:
    """Slices that cut n images into chunks of about ``_CHUNK_PIXELS`` pixels."""
    step = max(1, _CHUNK_PIXELS // box**2)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def random_uids(rng: np.random.Generator, n: int) -> NDArray[np.uint64]:
    """Random uids over all 64 bits, as CryoSPARC's are: half of them do not fit a signed integer."""
    return rng.integers(1, 2**64, n, dtype=np.uint64)

"""MRC image stacks: what their header says, and their pixels mapped into memory.

Only nx, ny, nz, mode and nsymbt (and the size of the file) are believed: in the wild the machine stamp, the ``MAP`` word,
mz, ispg, the statistics and the cell are often wrong. A stack is always (nz, ny, nx); z counts images from 0.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from .errors import ArgumentError, StackError

Mode0 = Literal["auto", "signed", "unsigned"]

#: Makes sure of a stack when it is first mapped.
Check = Callable[[str, "StackHeader"], None]

HEADER_BYTES = 1024
_IMOD_STAMP = 1146047817
_PIXEL_CODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_PIXELS = {(order, mode): np.dtype(f"{order}{code}") for order in "<>" for mode, code in _PIXEL_CODES.items()}
_REFUSED_MODES = {
    3: "complex 16-bit integers, a transform and not an image",
    4: "complex numbers, a transform and not an image",
    16: "RGB colours",
    101: "4-bit pixels",
}
_COMPRESSED = {b"\x1f\x8b": ("gzip", "gunzip"), b"BZ": ("bzip2", "bunzip2")}


@dataclass(frozen=True, slots=True)
class StackHeader:
    """What is needed to find the pixels of one stack: an MRC file, or another file that holds images of equal size from some byte on.

    Attributes
    ----------
    nx, ny, nz : columns, rows and images as the file says
    dtype : NumPy dtype of a pixel, byte order included
    offset : byte at which the first image starts
    n_complete : images that lie wholly inside the file (less than nz if the file is truncated)
    pixel_size : angstrom, or None where the header's value is a placeholder
    """

    nx: int
    ny: int
    nz: int
    dtype: np.dtype[np.generic]
    offset: int
    n_complete: int
    pixel_size: float | None

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return self.nx * self.ny * self.dtype.itemsize

    @property
    def layout(self) -> str:
        """How the bytes of a file become images, in words."""
        return f"images of {self.nx} x {self.ny} {self.dtype} from byte {self.offset} on"


def read_header(path: str | os.PathLike[str], *, mode0: Mode0 = "auto") -> StackHeader:
    """Read the header of an MRC stack.

    Parameters
    ----------
    path : the file
    mode0 : how to read 8-bit pixels (mode 0). "auto" takes them as signed, as MRC2014 says, unless IMOD's flag says
        unsigned; programs disagree, so "signed" and "unsigned" override.

    Raises
    ------
    StackError
        if the file cannot be read, is compressed, too short, not an MRC stack, or holds pixels that are no real images; says what to do
    """
    return _read_header(path, mode0, "cannot be read")


def parse_header(raw: bytes, file_bytes: int, path: str | os.PathLike[str], *, mode0: Mode0 = "auto") -> StackHeader:
    """The same as ``read_header`` from the first 1024 bytes and the size of the file; ``path`` is for messages."""
    require_mode0(mode0)
    order = _order(raw, file_bytes)
    for magic, (name, command) in _COMPRESSED.items():
        if raw.startswith(magic) and order is None:
            raise StackError(f"{path} is compressed with {name} and cannot be mapped into memory; unpack it first ({command}).")
    if len(raw) < HEADER_BYTES:
        raise StackError(f"{path} has {file_bytes} bytes, less than the {HEADER_BYTES} of an MRC header; copy or write it again.")
    if order is None:
        nx, ny, nz, mode = struct.unpack_from("<4i", raw)
        (nsymbt,) = struct.unpack_from("<i", raw, 92)
        raise StackError(f"{path} is not an MRC stack: its header reads nx={nx} ny={ny} nz={nz} mode={mode} nsymbt={nsymbt}.")
    nx, ny, nz, mode = struct.unpack_from(f"{order}4i", raw)
    if mode in _REFUSED_MODES:
        raise StackError(
            f"{path} holds {_REFUSED_MODES[mode]} (MRC mode {mode}). "
            "Write the particles as 32-bit or 16-bit floats (mode 2 or 12) and try again."
        )
    offset = HEADER_BYTES + struct.unpack_from(f"{order}i", raw, 92)[0]
    dtype = _PIXELS[order, mode] if mode else _mode0_dtype(raw, order, mode0)
    n_complete = min(nz, max(0, file_bytes - offset) // (nx * ny * dtype.itemsize))
    return StackHeader(nx, ny, nz, dtype, offset, n_complete, _pixel_size(raw, order, nx, ny))


def require_mode0(mode0: Mode0) -> None:
    """Raise an ``ArgumentError`` if this is no way to read 8-bit pixels."""
    if mode0 not in get_args(Mode0):
        raise ArgumentError(f"mode0 is one of {', '.join(map(repr, get_args(Mode0)))}, not {mode0!r}")


def map_stack(path: str | os.PathLike[str], header: StackHeader) -> np.ndarray:
    """The complete images of a stack as a read-only memory map, (n_complete, ny, nx) in the dtype of the file.

    The map lives as long as the array; nothing can be written through it.
    """
    shape = (header.n_complete, header.ny, header.nx)
    if header.n_complete == 0:
        return np.empty(shape, header.dtype)
    descriptor = open_to_map(path, header.offset + header.n_complete * header.image_bytes)
    try:
        mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise StackError(f"{path} cannot be mapped into memory: {error.strerror}.") from error
    finally:
        os.close(descriptor)
    return np.ndarray(shape, header.dtype, buffer=mapped, offset=header.offset)


def require_alike(path: str | os.PathLike[str], expected: StackHeader, *, mode0: Mode0 = "auto", index_hint: str = "") -> None:
    """Raise a ``StackError`` unless a stack is laid out as expected, like the first one, and has as many images."""
    found = _read_header(path, mode0, "cannot be opened any more")
    if found.layout != expected.layout:
        raise StackError(f"{path} has {found.layout}, the first stack {expected.layout}. Open the data set with check_headers=True.")
    if found.n_complete < expected.n_complete:
        hint = index_hint if expected.n_complete > found.nz else ""
        raise StackError(f"{describe_shortfall(path, found, expected.n_complete - 1)}{hint}.")


def require_unchanged(path: str | os.PathLike[str], expected: StackHeader, *, mode0: Mode0 = "auto") -> None:
    """Raise a ``StackError`` if another stack has taken the place of the one whose header was read: its pixels would be misread."""
    found = _read_header(path, mode0, "cannot be opened any more")
    if found.layout != expected.layout:
        raise StackError(f"{path} has {found.layout} now, and had {expected.layout} when it was opened. Open the data set again.")


def _read_header(path: str | os.PathLike[str], mode0: Mode0, failure: str) -> StackHeader:
    try:
        with open(path, "rb", buffering=0) as file:
            raw, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise StackError(f"{path} {failure}: {error.strerror}.") from error
    return parse_header(raw, size, path, mode0=mode0)


def open_to_map(path: str | os.PathLike[str], needed: int) -> int:
    """A file descriptor of a file that is at least ``needed`` bytes long; touching a map beyond the end would end the process.

    Raises
    ------
    StackError
        if the file cannot be opened or is shorter
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise StackError(f"{path} cannot be opened any more: {error.strerror}.") from error
    try:
        require_size(path, os.fstat(descriptor).st_size, needed)
    except StackError:
        os.close(descriptor)
        raise
    return descriptor


def require_size(path: str | os.PathLike[str], size: int, needed: int) -> None:
    """Raise a ``StackError`` if a file of this size (-1: it is gone) has become too short for what is to be read of it."""
    if size < needed:
        what = "is gone" if size < 0 else f"has shrunk to {size} bytes, of which {needed} are needed,"
        raise StackError(f"{path} {what} since the data set was made; is another program writing it?")


def describe_shortfall(path: str | os.PathLike[str], header: StackHeader, index: int) -> str:
    """Why image ``index`` (from 0) of a stack cannot be read."""
    if index < header.nz:
        return f"{path} is truncated: its header promises {header.nz} images, the file holds {header.n_complete} complete ones"
    return f"{path} has {header.nz} images, numbered 0 to {header.nz - 1}, and image {index} is asked for"


def _order(raw: bytes, file_bytes: int) -> Literal["<", ">"] | None:
    """Byte order of a header: the one in which it makes sense, and if both do, whose images fit the file; then as stamped."""
    if len(raw) < HEADER_BYTES:
        return None
    stamped: Literal["<", ">"] = ">" if raw[212:214] == b"\x11\x11" else "<"
    candidates: list[tuple[int, bool, Literal["<", ">"]]] = []
    for order in (stamped, "<" if stamped == ">" else ">"):
        nx, ny, nz, mode = struct.unpack_from(f"{order}4i", raw)
        nsymbt = struct.unpack_from(f"{order}i", raw, 92)[0]
        known = mode in _PIXEL_CODES or mode in _REFUSED_MODES
        if known and 0 < nx <= 1 << 17 and 0 < ny <= 1 << 17 and 0 < nz <= 1 << 28 and 0 <= nsymbt <= 1 << 30:
            image_bytes = nx * ny * (_PIXELS[order, mode].itemsize if mode in _PIXEL_CODES else 1)
            complete = (file_bytes - HEADER_BYTES - nsymbt) // image_bytes
            candidates.append((2 if complete >= nz else 1 if complete >= 1 else 0, order == stamped, order))
    return max(candidates)[2] if candidates else None


def _mode0_dtype(raw: bytes, order: str, mode0: Mode0) -> np.dtype[np.generic]:
    if mode0 == "auto":
        stamp, flags = struct.unpack_from(f"{order}2i", raw, 152)
        mode0 = "unsigned" if stamp == _IMOD_STAMP and not flags & 1 else "signed"
    return np.dtype("u1" if mode0 == "unsigned" else "i1")


def _pixel_size(raw: bytes, order: str, nx: int, ny: int) -> float | None:
    """Pixel size from the cell, unless it is a placeholder: zero, exactly 1 A, not square, absurd, or of another grid."""
    mx, my = struct.unpack_from(f"{order}2i", raw, 28)
    cell_x, cell_y = struct.unpack_from(f"{order}2f", raw, 40)
    if (mx, my) != (nx, ny):
        return None
    size_x, size_y = cell_x / nx, cell_y / ny
    plausible = 0.05 < size_x < 100 and abs(size_x - size_y) < 1e-3 * size_x and abs(size_x - 1.0) > 1e-6
    return float(size_x) if plausible else None

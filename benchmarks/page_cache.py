"""Files out of the page cache of the system, and into it."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from pathlib import Path

import numpy as np

_BLOCK = 4 << 20


def forget(paths: list[Path]) -> float:
    """Have the system forget files; the share of their pages that are in memory all the same (what is mapped stays)."""
    gc.collect()
    pages = left = 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            resident = _resident(descriptor)
        finally:
            os.close(descriptor)
        pages, left = pages + len(resident), left + int(resident.sum())
    return left / pages


def read_through(paths: list[Path], wanted: int | None = None) -> int:
    """Read files from beginning to end with plain reads, until as many bytes as wanted have come."""
    block = bytearray(_BLOCK)
    moved = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while (wanted is None or moved < wanted) and (got := file.readinto(block)):
                moved += got
    return moved


def _resident(descriptor: int) -> np.ndarray:
    """(pages,) booleans: which pages of a file are in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    length = os.fstat(descriptor).st_size
    state = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
    with mmap.mmap(descriptor, length, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        failed = libc.mincore(view.ctypes.data, length, state.ctypes.data)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return (state & 1).astype(bool)

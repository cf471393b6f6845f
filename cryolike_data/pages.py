"""Pages of files that are mapped: which of them are in memory, and having others brought there (Linux)."""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import cache
from typing import Any

import numpy as np

try:
    import resource
except ImportError:  # on Windows, where no data set can ask ahead
    resource = None  # type: ignore[assignment]

PAGE = mmap.PAGESIZE
_MADV_WILLNEED = 3
_MAX_RANGES = 1024
_SYS_PROCESS_MADVISE = 440


def page_runs(begin: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Page-aligned (begin, length) of the ranges that sorted, equally long stretches of memory make up; neighbours merge."""
    first = begin // PAGE * PAGE
    last = -(-(begin + length) // PAGE) * PAGE
    starts = np.flatnonzero(np.concatenate([[True], first[1:] > last[:-1]]))
    runs = first[starts]
    return runs, np.maximum.reduceat(last, starts) - runs


def tells_what_is_resident(path: str) -> bool:
    """Whether ``is_resident`` is to be believed of a file: of those that one may not write to, Linux says that all is there."""
    return os.access(path, os.W_OK)


def is_resident(address: int, length: int) -> bool:
    """Whether a stretch of mapped memory can be read without waiting for the disk."""
    first = address // PAGE * PAGE
    pages = -(-(address + length - first) // PAGE)
    state = (ctypes.c_ubyte * pages)()
    return _mincore()(first, pages * PAGE, state) == 0 and all(page & 1 for page in state)


def _own_pidfd() -> int | None:
    """A descriptor of this process, or None on a system that gives none."""
    try:
        return os.pidfd_open(os.getpid())
    except (AttributeError, OSError):
        return None


def waits_for_disk() -> int:
    """How often this process has touched a page that was not in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt if resource else 0


def blocks_read() -> int:
    """Blocks of 512 bytes that this thread has had read from the disk, by asking ahead, too, as far as the file system counts them."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock


def will_need(begin: np.ndarray, length: np.ndarray) -> None:
    """Advice only: where the kernel takes none, the images are read when they are needed."""
    ranges = np.stack([begin, length], axis=1).astype(np.uint64)
    done = 0
    descriptor = _own_pidfd()
    if descriptor is not None:
        try:
            while done < len(ranges):
                part = np.ascontiguousarray(ranges[done : done + _MAX_RANGES])
                if libc().syscall(_SYS_PROCESS_MADVISE, descriptor, part.ctypes.data, len(part), _MADV_WILLNEED, 0) < 0:
                    break  # an old kernel, or not permitted: one by one
                done += len(part)
        finally:
            os.close(descriptor)
    for address, size in ranges[done:].tolist():
        libc().madvise(address, size, _MADV_WILLNEED)


@cache
def libc() -> Any:
    """The C library of Linux, with the types of the functions that are called here, in ``arena`` and in ``files``."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    library.syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint]
    return library


@cache
def _mincore() -> Any:
    # Through PyDLL, which keeps the interpreter lock: the call takes a microsecond, and other threads would have the lock for longer.
    mincore = ctypes.PyDLL(None).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return mincore

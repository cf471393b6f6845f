"""An arena: many files mapped read-only into one reserved range of addresses, so that one call gathers images from all of them.

Every image is a row of one strided tensor over the whole range (or a few rows, where it is large), and ``torch.index_select``
copies any rows, on all its threads, with the interpreter lock released once. Linux only; where an arena cannot serve,
``stacks.py`` reads file by file.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import StackError
from .file_size import CHECK_EVERY, file_size
from .memory import alive
from .mrc import open_to_map, require_size
from .pages import PAGE, blocks_read, is_resident, libc, page_runs, tells_what_is_resident, will_need

#: Files start at multiples of the largest of these that any of them fills. Where pages lie together in memory and start here as they
#: do there, the kernel maps and the processor looks them up together, up to the largest (figure ``stream``, 5,000 stacks).
_ALIGNMENTS = (2 << 20, 64 << 10, PAGE)
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value
#: Images of a request whose presence in memory is looked at.
_SAMPLED = 8
#: Images whose places are worked out at a time.
_LOCATED = 1 << 16
#: Maps that the rest of the process (libraries, threads) may still need.
_SPARE_MAPS = 2000
_ARENAS: weakref.WeakSet[Arena] = weakref.WeakSet()
#: With more than a thousand files: seconds per file, so that looking stays a small share of the time.
_CHECK_SHARE = 1e-3
#: ``index_select`` hands the rows out to its threads, which copy each with one ``memcpy``, if rows have fewer numbers than this
#: (the grain size of torch); larger ones it copies one by one, each with all threads, which takes longer (figure ``read``, 256 px).
_ROW_NUMBERS = 1 << 15
#: Rows of fewer bytes take longer than is won by handing them out.
_ROW_BYTES = 3 << 10
#: What rows are seen as, by bytes: the larger the numbers, the fewer of them.
_NUMBERS = {1: "i1", 2: "i2", 4: "i4", 8: "i8", 16: "c16"}
#: Pixels that torch knows, too.
_PIXELS = {"i1", "u1", "i2", "u2", "f2", "f4", "f8"}


class NoMoreMapsError(StackError):
    """The system maps no further file into memory (most likely ``vm.max_map_count``)."""


class Arena:
    """Files mapped at fixed places of one address range, each when it is first needed.

    Parameters
    ----------
    paths : the files
    starts : byte at which the first image of each file starts
    counts : images of each file; a file with none is never touched
    shape : (rows, columns) of an image, the same in all files
    dtype : of its pixels
    check : called with the number of a file before it is mapped; raises if the file is not what is expected

    A file that has shrunk is noticed when it is next read more than a second after its size was last looked at (a millisecond
    for each file beyond a thousand, where there are that many), and is an error. Reading the missing part of a file that shrank
    within that time still ends the process (SIGBUS), as reading any memory map does; nothing short of copying through system
    calls can prevent it.
    """

    def __init__(
        self,
        paths: Sequence[str],
        starts: np.ndarray,
        counts: np.ndarray,
        *,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        check: Callable[[int], None] | None = None,
    ) -> None:
        self._paths = tuple(paths)
        self._check = check
        self._counts = counts.astype(np.uint64)
        self._shape = ny, nx = shape
        self._image_bytes = image_bytes = ny * nx * dtype.itemsize
        self._sizes = np.where(counts > 0, starts + counts * image_bytes, 0).astype(np.int64)
        largest = max(PAGE, int(self._sizes.max(initial=0)))
        alignment = next(alignment for alignment in _ALIGNMENTS if alignment <= largest)
        self._spans = -(-self._sizes // alignment) * alignment
        self._places = np.cumsum(self._spans) - self._spans
        length = int(self._spans.sum())
        self._step = math.gcd(PAGE, image_bytes, *np.unique(starts[counts > 0]).tolist())
        self._first = (self._places + starts) // self._step
        self._rows_per_image = image_bytes // self._step
        self._pieces = _pieces(image_bytes, self._step)
        self._seen = np.full(len(paths), -np.inf)
        self._mapped = np.zeros(len(paths), bool)
        self._maps, self._most_maps = 0, int(np.count_nonzero(counts))
        self._can_look = True  # at what is in memory
        reserved = _reserve(length + _ALIGNMENTS[0])
        self._address = -(-reserved // _ALIGNMENTS[0]) * _ALIGNMENTS[0]
        range_: Any = (ctypes.c_ubyte * length).from_address(self._address)
        # Every view keeps the range, and may outlive the arena. Not at the end of the program: threads may be reading then, and the
        # system unmaps by itself.
        weakref.finalize(range_, _unmap, reserved, length + _ALIGNMENTS[0]).atexit = False
        self._pixels = torch.from_numpy(np.frombuffer(range_, dtype))
        # Rows overlap wherever an image may start at a multiple of the step; only those that are images are ever touched.
        self._number = np.dtype(_NUMBERS[math.gcd(max(_NUMBERS), self._step)])
        width = image_bytes // self._pieces // self._number.itemsize
        n_rows = (length - image_bytes // self._pieces) // self._step + 1
        numbers = torch.from_numpy(np.frombuffer(range_, self._number))
        self._rows = numbers.as_strided((n_rows, width), (self._step // self._number.itemsize, 1))
        _ARENAS.add(self)

    def rows_of(self, file: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Where image ``image[k]`` of file ``file[k]`` lies, for all k: what ``gather`` takes; -1 for what is not in the arena."""
        # Half the memory for up to some terabytes, and half the cache that looking them up takes.
        rows = np.empty(len(file), np.int32 if len(self._rows) < 1 << 31 else np.int64)
        for start in range(0, len(file), _LOCATED):  # what is needed on the way stays small
            part = slice(start, start + _LOCATED)
            of_file, in_file = file[part], image[part].astype(np.int64, copy=False)
            places = self._first[of_file] + in_file * self._rows_per_image
            # Seen as unsigned, a negative number is larger than any count.
            places[in_file.view(np.uint64) >= self._counts[of_file]] = -1
            rows[part] = places
        return rows

    def pieces_of(self, rows: np.ndarray) -> Tensor:
        """What ``gathering`` takes for the images at ``rows``, (..., B), none of them -1."""
        if self._pieces > 1:
            steps = np.arange(self._pieces, dtype=rows.dtype) * (self._rows_per_image // self._pieces)
            rows = (rows[..., None] + steps).reshape(*rows.shape[:-1], -1)
        return torch.from_numpy(rows)

    def numbers_of(self, out: np.ndarray) -> Tensor:
        """Memory for (B, H, W) images, B > 0, as ``gathering`` writes to it."""
        # Seen anew through NumPy: each call of torch gives the interpreter lock away, and a busy main thread keeps it for 5 ms.
        return torch.from_numpy(out.reshape(len(out) * self._pieces, -1).view(self._number))

    def gathering(self, pieces: Tensor, numbers: Tensor) -> Callable[[], Tensor]:
        """What copies images, their files touched, from where ``pieces_of`` says to memory as ``numbers_of`` gives it."""
        return partial(torch.index_select, self._rows, 0, pieces, out=numbers)

    def view(self, rows: np.ndarray) -> Tensor | None:
        """The images at ``rows`` where they lie, if that is one after the other; touched files, and for reading only."""
        if (np.diff(rows) != self._rows_per_image).any():
            return None
        ny, nx = self._shape
        first = int(rows[0]) * (self._step // self._pixels.element_size())
        return self._pixels.as_strided((len(rows), ny, nx), (ny * nx, nx, 1), first)

    def seen_until(self, files: np.ndarray) -> float:
        """When the size of one of these files has to be looked at again, on the clock of ``time.monotonic``."""
        return float(self._seen[files].min()) + self._fresh

    def touch(self, file: np.ndarray) -> None:
        """Make sure that the files are mapped and as long as they have to be.

        Raises
        ------
        StackError
            if one has become shorter or is gone
        """
        now = time.monotonic()
        due = file[self._seen[file] < now - self._fresh]
        if not len(due):
            return
        for number in np.unique(due).tolist():
            if self._mapped[number]:
                require_size(self._paths[number], file_size(self._paths[number]), int(self._sizes[number]))
            else:
                self._map(number)
        self._seen[due] = now

    def in_memory(self, rows: np.ndarray) -> bool:
        """Whether all the images at ``rows`` are known to be in memory; those of a file that is yet to be mapped are not."""
        return self._can_look and self._are_resident(self._addresses(rows))

    def ask_ahead(self, rows: np.ndarray) -> bool:
        """Have the pages of the images (their files touched) read into memory, unless a sample is there; returns before they are.

        True if they were asked for, False if the sample was there. With files of which the system does not tell what is there, all
        are asked for, and it is False if none had to be read.

        All ranges go to the kernel in one system call where it takes many (``process_madvise``), so that a busy main thread
        gets the interpreter lock back once and not once per image.
        """
        begin = np.sort(self._addresses(rows))
        if self._can_look and self._are_resident(sample_of(begin)):
            return False
        before = blocks_read()
        will_need(*page_runs(begin, self._image_bytes))
        return self._can_look or blocks_read() > before

    def _addresses(self, rows: np.ndarray) -> np.ndarray:
        return self._address + rows.astype(np.int64) * self._step

    def _are_resident(self, begin: np.ndarray) -> bool:
        return all(is_resident(address, self._image_bytes) for address in begin.tolist())

    @property
    def _fresh(self) -> float:
        """Seconds for which a look at a file's size is good."""
        return max(CHECK_EVERY, _CHECK_SHARE * (len(self._paths) - 1000))

    def _map(self, number: int) -> None:
        path = self._paths[number]
        if self._check is not None:
            self._check(number)
        size = int(self._sizes[number])
        if _maps_in_use() + _SPARE_MAPS > _max_maps():
            raise NoMoreMapsError(f"{path} cannot be mapped beside the many thousands of files of other data sets.")
        descriptor = open_to_map(path, size)
        try:
            place, span = self._address + int(self._places[number]), int(self._spans[number])
            # To the next file, because a gap would be a map of its own to the kernel.
            if libc().mmap(place, span, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0) != place:
                code = ctypes.get_errno()
                raise NoMoreMapsError(f"{path} cannot be mapped into memory: {os.strerror(code)}.")
        finally:
            os.close(descriptor)
        if not self._mapped[number]:  # another thread may have mapped it too
            # What lies between two files that are mapped is a map of its own, as long as nothing in it is.
            self._maps = min(self._maps + 2, self._most_maps)
        self._mapped[number] = True
        self._can_look = self._can_look and tells_what_is_resident(self._paths[number])


def sample_of(rows: np.ndarray) -> np.ndarray:
    """A few of them, evenly spread."""
    return rows[:: max(1, len(rows) // _SAMPLED)]


def _maps_in_use() -> int:
    """Maps of all arenas of the process, with the gaps between them."""
    return sum(arena._maps for arena in alive(_ARENAS))


def can_map(n_files: int, starts: np.ndarray, dtype: np.dtype[Any]) -> bool:
    """Whether an arena can serve: on Linux, with pixels at multiples of their size, and enough maps allowed."""
    if sys.platform != "linux" or dtype.kind + str(dtype.itemsize) not in _PIXELS or (starts % dtype.itemsize).any():
        return False
    return n_files + _SPARE_MAPS <= _max_maps()


def _pieces(image_bytes: int, step: int) -> int:
    """Rows per image: as few as there can be, such that each starts at a multiple of the step and has few enough numbers."""
    numbers, steps = image_bytes // math.gcd(max(_NUMBERS), step), image_bytes // step
    fitting = range(numbers // _ROW_NUMBERS + 1, image_bytes // _ROW_BYTES + 1)
    return next((pieces for pieces in fitting if steps % pieces == 0), 1)


@cache
def _max_maps() -> int:
    try:
        with open("/proc/sys/vm/max_map_count") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 65530


def _reserve(length: int) -> int:
    # No memory stands behind it, and touching it outside a file would be an error.
    address = libc().mmap(None, length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0), -1, 0)
    if address in (None, _FAILED):
        raise NoMoreMapsError(f"No range of {length} bytes of addresses can be reserved: {os.strerror(ctypes.get_errno())}.")
    return int(address)


def _unmap(address: int, length: int) -> None:
    libc().munmap(address, length)

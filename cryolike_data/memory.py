"""Memory straight from the system, which has it back as soon as nobody uses it any more."""

from __future__ import annotations

import math
import mmap
import threading
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

ObjectT = TypeVar("ObjectT")

#: Bytes of an array that is worth pages of its own.
_OWN_PAGES = 1 << 16
#: Bytes of a large page of most systems.
_HUGE_PAGE = 1 << 21
#: A little less than the largest piece from which glibc learns what to keep (32 MB).
_LEARNED_BYTES = 31 << 20


def own_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in memory of its own, filled with zeros; a large one in a handful of large pages in place of thousands.

    Of memory that is used for a short time the allocator keeps what lies below something that stays, and of many threads for each:
    with columns and buffers of images that adds up.

    Parameters
    ----------
    shape, dtype : of the array, which is writable
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < _OWN_PAGES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.zeros(shape, dtype)
    huge_pages = size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
    # With a whole number of large pages the system lets them start where one can, and none is taken apart.
    whole = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    room = whole if huge_pages and whole - size < size // 8 else size
    pages = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge_pages:
        with suppress(OSError):  # a kernel that is made without large pages, as one for real time is
            pages.madvise(mmap.MADV_HUGEPAGE)
        # Found now, by the thread that asks: the one that gave such memory back before is given it again, and others may be given some
        # that a virtual machine has to ask its host for, page by page.
        np.frombuffer(pages, np.uint8)[::_HUGE_PAGE] = 0
    return np.frombuffer(pages, dtype, math.prod(shape)).reshape(shape)


class _OfThread(threading.local):
    """What a thread keeps by what it is used for."""

    def __init__(self) -> None:
        self.kept: dict[str, np.ndarray] = {}


_OF_THREAD = _OfThread()


def kept_tensor(use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor for images that are worked on piece by piece, in memory that a thread has for a use and keeps as long as it lives.

    The next tensor for the same use lies in the same memory, which then need not be found again. What is in it is left to chance.
    """
    size = math.prod(shape) * dtype.itemsize
    kept = _OF_THREAD.kept.get(use)
    if kept is None or len(kept) < size:
        kept = _OF_THREAD.kept[use] = own_array((size,), np.uint8)
    return torch.from_numpy(kept[:size]).view(dtype).view(shape)


@cache
def keep_freed_memory() -> None:
    """Have the C library keep what is freed, up to some 60 MB, for intermediates of a few MB that come and go.

    glibc gives memory back as soon as twice the largest piece is free that it saw freed. With several intermediates of a size that is
    each time: finding their pages again then takes as long as the work on them.
    """
    np.empty(_LEARNED_BYTES, np.uint8)  # freed at once; it was never written, so that it costs nothing


def alive(objects: WeakSet[ObjectT]) -> list[ObjectT]:
    """Those that are still there, while other threads may add some; a lock might stay locked in a fork."""
    while True:
        try:
            return list(objects)
        except RuntimeError:  # one was added in between
            continue

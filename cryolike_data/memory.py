"""Memory straight from the system, which has it back as soon as nobody uses it any more."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Bytes of an array that is worth pages of its own, and from which on huge pages are asked for.
_OWN_PAGES, _HUGE_PAGES = 1 << 16, 4 << 20


def own_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in memory of its own, filled with zeros.

    Of memory that is used for a short time the allocator keeps what lies below something that stays, and of many threads for each:
    with columns and buffers of images that adds up.

    Parameters
    ----------
    shape, dtype : of the array, which is writable and starts at a page
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < _OWN_PAGES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.zeros(shape, dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE_PAGES and hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # a handful of page faults in place of thousands
    return np.frombuffer(pages, dtype).reshape(shape)


def own_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same as a tensor."""
    return torch.from_numpy(own_array((math.prod(shape) * dtype.itemsize,), np.uint8)).view(dtype).view(shape)

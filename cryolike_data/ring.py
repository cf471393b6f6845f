"""Reused image buffers. A buffer belongs to whoever holds a tensor made of it, and comes back by itself when the last one is gone."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64


class BufferRing:
    """Buffers for images: as many as are in use at a time, which is up to whoever borrows them and holds on to them.

    Parameters
    ----------
    shape : of an image
    dtype : of its pixels
    pinned : page-locked memory, for copies to CUDA that overlap with everything else
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> None:
        self._shape, self._dtype, self._pinned = shape, dtype, pinned
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)  # by the number of images
        self._lent: dict[int, _Loan] = {}
        self._closed = False

    def lend(self, images: int) -> Tensor:
        """A tensor of so many images, to be filled, whose storage gives its buffer back when its last user lets go of it.

        The buffer is the one of this size that was given back last, which the cache may still hold, or a new one.
        """
        free = self._free[images]
        buffer = free.pop() if free else _aligned((images, *self._shape), self._dtype, pinned=self._pinned)
        # A new array object, which torch keeps alive for exactly as long as any tensor shares this storage.
        view = buffer[:]
        loan = _Loan(view, self._give_back)
        loan.buffer = buffer
        self._lent[id(loan)] = loan  # a weak reference that nobody keeps calls nobody
        return torch.from_numpy(view)

    def close(self) -> None:
        """Let go of all free buffers, and of the others as they come back."""
        self._closed = True
        self._free.clear()

    def _give_back(self, loan: _Loan) -> None:
        del self._lent[id(loan)]
        if not self._closed:
            self._free[len(loan.buffer)].append(loan.buffer)


class _Loan(weakref.ref[np.ndarray]):
    """Calls back when the array is gone that a buffer was lent as."""

    __slots__ = ("buffer",)
    buffer: np.ndarray


def _aligned(shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> np.ndarray:
    """An uninitialised array that starts at a multiple of 64 bytes; copies into others can be several times slower."""
    if pinned:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True).numpy()
    kind = torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
    size = math.prod(shape) * kind.itemsize
    # From NumPy, which asks for huge pages.
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)

"""Reused image buffers. A buffer belongs to whoever holds a tensor made of it, and comes back by itself when the last one is gone."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64


class BufferRing:
    """Buffers for images: as many as are in use at a time, which is up to whoever borrows them and holds on to them.

    They are lent by one thread at a time, and come back from any.

    Parameters
    ----------
    shape : of an image
    dtype : of its pixels
    pinned : page-locked memory, for copies to CUDA that overlap with everything else
    keep : free buffers of one size that are kept, at most; those that came back first go
    seen_as : what a buffer is to who fills it, worked out once for each
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool, keep: int, seen_as: Callable[[np.ndarray], Any]
    ) -> None:
        self._shape, self._dtype, self._pinned, self._keep, self._seen_as = shape, dtype, pinned, keep, seen_as
        self._free: defaultdict[int, deque[_Buffer]] = defaultdict(partial(deque, maxlen=keep))  # by the number of images
        self._lent: dict[int, _Loan] = {}
        self._back: deque[_Loan] = deque()  # in the order in which their buffers came back

    def lend(self, images: int) -> tuple[Tensor, Any]:
        """A tensor of so many images whose storage gives its buffer back when its last user lets go of it, and what fills it.

        The buffer is the one of this size that was given back last, which the cache may still hold, or a new one.
        """
        self._take_back()
        free = self._free[images]
        buffer = free.pop() if free else self._new(images)
        # A new array object, which torch keeps alive for exactly as long as any tensor shares this storage.
        view = buffer.array[:]
        # What is called must not be Python code: Ctrl-C that comes in there is lost, as a weak reference has nobody to raise it to.
        loan = _Loan(view, self._back.append)
        loan.buffer = buffer
        self._lent[id(loan)] = loan  # a weak reference that nobody keeps calls nobody
        with outside_inference_mode():
            return torch.from_numpy(view), buffer.seen

    def rest(self) -> None:
        """Forget the buffers that were lent first, but for as many as are kept: their memory goes with their last users."""
        self._take_back()
        for lent in list(self._lent)[: -self._keep]:
            self._lent.pop(lent, None)

    def close(self) -> None:
        """Let go of all free buffers, and of the others as soon as nobody uses them."""
        self._lent.clear()
        self._back.clear()
        self._free.clear()

    def _new(self, images: int) -> _Buffer:
        array = _aligned((images, *self._shape), self._dtype, pinned=self._pinned)
        with outside_inference_mode():
            return _Buffer(array, self._seen_as(array))

    def _take_back(self) -> None:
        while self._back:
            try:
                loan = self._back.popleft()
            except IndexError:  # another thread has just closed the ring
                return
            self._lent.pop(id(loan), None)
            self._free[len(loan.buffer.array)].append(loan.buffer)


def outside_inference_mode() -> AbstractContextManager[object]:
    """For what is made for batches to come: the consumer may be in that mode for this one alone."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def rows_apart(tensor: Tensor, rows: slice) -> Tensor:
    """``tensor[rows]`` in the same memory, of which autograd does not know: a view would follow what is computed in place from others."""
    with outside_inference_mode():
        return tensor[rows].data


class _Buffer(NamedTuple):
    array: np.ndarray
    seen: Any


class _Loan(weakref.ref[np.ndarray]):
    """Calls back when the array is gone that a buffer was lent as."""

    __slots__ = ("buffer",)
    buffer: _Buffer


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

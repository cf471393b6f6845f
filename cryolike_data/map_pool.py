"""A bounded pool of memory maps: stacks of any kind read file by file, where an arena cannot hold them."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .mrc import Check, StackHeader, map_stack

#: Maps kept open at once, per process. Each costs a file descriptor, of which 1024 is a common limit.
MAX_OPEN_MAPS = 256


class MapPool:
    """Stacks that are mapped when they are needed; the least recently used is let go when there are too many.

    Copies image by image, so it serves mixed dtypes, both byte orders and any header size. Safe to share between threads.

    Parameters
    ----------
    paths, headers : the stacks
    max_open : how many stay mapped
    check : called before a stack is mapped; raises if its header is not what is expected

    Attributes
    ----------
    dtype : the native dtype in which all of them can be read without loss
    """

    def __init__(
        self, paths: Sequence[str], headers: Sequence[StackHeader], *, max_open: int = MAX_OPEN_MAPS, check: Check | None = None
    ) -> None:
        self._paths, self._headers, self._max_open, self._check = paths, headers, max_open, check
        kinds = {dtype.newbyteorder("=") for dtype in {header.dtype for header in headers}}
        self.dtype: np.dtype[Any] = np.result_type(*kinds) if kinds else np.dtype("f4")
        self._forget_maps()

    def read_into(self, file: np.ndarray, image: np.ndarray, out: np.ndarray) -> None:
        """Copy image ``image[k]`` of file ``file[k]`` into ``out[k]``, converted to its dtype, for all k."""
        order = np.lexsort((image, file))
        cuts = np.flatnonzero(np.diff(file[order])) + 1
        for rows in np.split(order, cuts) if len(order) else []:
            number = int(file[rows[0]])
            stack = self._stack(number)
            for row, z in zip(rows.tolist(), image[rows].tolist(), strict=True):
                out[row] = stack[z]

    def _stack(self, number: int) -> np.ndarray:
        if self._process != os.getpid():
            # The lock may have been held by a thread that the fork left behind.
            self._forget_maps()
        with self._lock:
            stack = self._maps.get(number)
            if stack is None:
                if self._check is not None:
                    self._check(self._paths[number], self._headers[number])
                stack = self._maps[number] = map_stack(self._paths[number], self._headers[number])
                if len(self._maps) > self._max_open:
                    self._maps.popitem(last=False)
            else:
                self._maps.move_to_end(number)
            return stack

    def _forget_maps(self) -> None:
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

"""A bounded pool of memory maps: stacks of any kind read file by file, where an arena cannot hold them."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import StackError
from .file_size import CHECK_EVERY, file_size
from .mrc import Check, StackHeader, map_stack, require_size

#: Maps kept open at once, at most. Each costs a file descriptor, and a pool takes no more than a quarter of those that a process may have:
#: 1024 is a common limit on Linux, 256 that of macOS. Where others have used them up, fewer maps are open.
_MAX_OPEN_MAPS = 256
_NO_MORE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class MapPool:
    """Stacks that are mapped when they are needed; the least recently used is let go when there are too many.

    Copies image by image, so it serves mixed dtypes, both byte orders and any header size. Safe to share between threads. A file that
    has shrunk is noticed as by ``Arena``.

    Parameters
    ----------
    paths, headers : the stacks
    max_open : how many stay mapped; None for as many as may be
    check : called before a stack is mapped; raises if its header is not what is expected

    Attributes
    ----------
    dtype : the native dtype in which all of them can be read without loss
    """

    def __init__(
        self, paths: Sequence[str], headers: Sequence[StackHeader], *, max_open: int | None = None, check: Check | None = None
    ) -> None:
        self._paths, self._headers, self._check = paths, headers, check
        self._max_open = max_open or _max_open_maps()
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
            now = time.monotonic()
            if stack is None:
                stack = self._maps[number] = self._map(number)
                self._seen[number] = now
                if len(self._maps) > self._max_open:
                    self._maps.popitem(last=False)
            else:
                self._maps.move_to_end(number)
                if now > self._seen[number] + CHECK_EVERY:
                    path, header = self._paths[number], self._headers[number]
                    require_size(path, file_size(path), header.offset + header.n_complete * header.image_bytes)
                    self._seen[number] = now
            return stack

    def _map(self, number: int) -> np.ndarray:
        path, header = self._paths[number], self._headers[number]
        try:
            if self._check is not None:
                self._check(path, header)
            return map_stack(path, header)
        except StackError as error:
            # Others of this process may have used up its file descriptors or maps; those of the pool can be had again.
            if getattr(error.__cause__, "errno", None) not in _NO_MORE or not self._maps:
                raise
            self._maps.clear()
        return self._map(number)

    def _forget_maps(self) -> None:
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._seen: dict[int, float] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()


def _max_open_maps() -> int:
    descriptors = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1  # of which -1 is no limit
    return min(_MAX_OPEN_MAPS, descriptors // 4) if descriptors > 0 else _MAX_OPEN_MAPS

"""Many MRC stacks read as one: headers known up front, files mapped lazily, at most a bounded number of maps at a time."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .errors import CryolikeDataError, StackError
from .mrc import Mode0, MrcHeader, describe_shortfall, map_stack, read_header

#: Maps kept open at once, per process. Each costs a file descriptor, of which 1024 is a common limit.
MAX_OPEN_MAPS = 256


class ImageSource(Protocol):
    """Where a data set's pixels come from: anything that can put chosen images into a buffer."""

    dtype: np.dtype[np.generic]

    def read_into(self, file: np.ndarray, image: np.ndarray, out: np.ndarray) -> None:
        """Copy image ``image[k]`` of file ``file[k]`` into ``out[k]``, for all k."""


@dataclass
class StackPool:
    """A set of MRC stacks with equal box sizes.

    Attributes
    ----------
    paths : the files
    headers : one per file
    dtype : the native dtype in which all of them can be read without loss
    max_open : how many files stay mapped at once; the least recently used is let go first

    Safe to share between threads. Pickles without its maps, which are opened again when needed.
    """

    paths: tuple[str, ...]
    headers: tuple[MrcHeader, ...]
    max_open: int = MAX_OPEN_MAPS

    def __post_init__(self) -> None:
        kinds = {header.dtype.newbyteorder("=") for header in self.headers}
        self.dtype: np.dtype[np.generic] = np.result_type(*kinds) if kinds else np.dtype("f4")
        self._forget_maps()

    def read_into(self, file: np.ndarray, image: np.ndarray, out: np.ndarray) -> None:
        """Copy image ``image[k]`` of file ``file[k]`` into ``out[k]`` (native byte order), for all k.

        Parameters
        ----------
        file, image : (B,) integer arrays
        out : (B, H, W) array of ``dtype``
        """
        order = np.lexsort((image, file))
        cuts = np.flatnonzero(np.diff(file[order])) + 1
        for rows in np.split(order, cuts) if len(order) else []:
            number = int(file[rows[0]])
            last = int(image[rows[-1]])
            if last >= self.headers[number].n_complete:
                raise StackError(describe_shortfall(self.paths[number], self.headers[number], last) + ".")
            stack = self._stack(number)
            for row, z in zip(rows.tolist(), image[rows].tolist(), strict=True):
                out[row] = stack[z]

    def shape(self, file: int) -> tuple[int, int]:
        """(ny, nx) of the images of one file."""
        return self.headers[file].ny, self.headers[file].nx

    def _stack(self, number: int) -> np.ndarray:
        if self._process != os.getpid():
            # The lock may have been held by a thread that the fork left behind.
            self._forget_maps()
        with self._lock:
            stack = self._maps.get(number)
            if stack is None:
                stack = self._maps[number] = map_stack(self.paths[number], self.headers[number])
                if len(self._maps) > self.max_open:
                    self._maps.popitem(last=False)
            else:
                self._maps.move_to_end(number)
            return stack

    def _forget_maps(self) -> None:
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "headers": self.headers, "max_open": self.max_open, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_maps()


def open_stacks(paths: Sequence[str | os.PathLike[str]], *, mode0: Mode0 = "auto") -> StackPool:
    """Read the headers of all files, several at a time, and give the pool that reads them.

    Raises
    ------
    StackError
        listing every file whose header cannot be used
    """
    names = tuple(os.fspath(path) for path in paths)

    def header_or_error(name: str) -> MrcHeader | CryolikeDataError | OSError:
        try:
            return read_header(name, mode0=mode0)
        except (CryolikeDataError, OSError) as error:
            return error

    with ThreadPoolExecutor(max_workers=8) as pool:
        results = list(pool.map(header_or_error, names))
    errors = [str(result) for result in results if isinstance(result, Exception)]
    if errors:
        raise StackError("\n".join([f"{len(errors)} of {len(names)} stacks cannot be read:", *(f"  {text}" for text in errors)]))
    return StackPool(names, tuple(result for result in results if isinstance(result, MrcHeader)))

"""Many MRC stacks read as one: headers known up front, files mapped when they are first needed."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np

from .arena import Arena, NoMoreMapsError, can_map
from .errors import CryolikeDataError, StackError
from .map_pool import MapPool
from .mrc import Check, Mode0, MrcHeader, describe_shortfall, read_header, require_alike

log = logging.getLogger(__name__)


#: Threads that read headers, which mostly wait for the file system.
_THREADS = 8


class ImageSource(Protocol):
    """Where a data set's pixels come from: anything that can put chosen images into a buffer."""

    dtype: np.dtype[Any]

    def read_into(self, file: np.ndarray, image: np.ndarray, out: np.ndarray) -> None:
        """Copy image ``image[k]`` of file ``file[k]`` into ``out[k]``, for all k."""

    def ask_ahead(self, file: np.ndarray, image: np.ndarray) -> bool:
        """Start to bring images into the page cache; returns before they are there. False if there was nothing to do."""


class MrcStacks:
    """A set of MRC stacks: through an arena where one can hold them, else through a pool of maps.

    Attributes
    ----------
    paths : the files
    headers : one per file
    dtype : the native dtype in which all of them can be read without loss

    Safe to share between threads. Pickles without its maps, which are opened again when needed.
    """

    def __init__(self, paths: Sequence[str], headers: Sequence[MrcHeader], *, check: Check | None = None) -> None:
        self.paths, self.headers = tuple(paths), tuple(headers)
        self._check = check
        self._pool = MapPool(self.paths, self.headers, check=check)
        self.dtype = self._pool.dtype
        self._counts = np.array([header.n_complete for header in self.headers])
        self._arena: Arena | Literal[False] | None = None
        self._deciding, self._process = threading.Lock(), os.getpid()

    def read_into(self, file: np.ndarray, image: np.ndarray, out: np.ndarray) -> None:
        """Copy image ``image[k]`` of file ``file[k]`` into ``out[k]`` (native byte order), for all k.

        Parameters
        ----------
        file, image : (B,) integer arrays
        out : (B, H, W) contiguous array of ``dtype``

        Raises
        ------
        StackError
            if a file cannot be opened any more, is truncated, or has shrunk (for what remains possible then, see ``Arena``)
        """
        if len(out) == 0:
            return
        arena = self._arena_of(out[0].nbytes)
        if arena and arena.holds(file, image):
            try:
                arena.gather(file, image, out)
                return
            except NoMoreMapsError as error:
                log.info("%s Files are read one by one.", error)
                self._arena = False
        beyond = (image >= self._counts[file]) | (image < 0)
        if beyond.any():
            k = int(np.argmax(beyond))
            raise StackError(describe_shortfall(self.paths[file[k]], self.headers[file[k]], int(image[k])) + ".")
        self._pool.read_into(file, image, out)

    def ask_ahead(self, file: np.ndarray, image: np.ndarray) -> bool:
        """Start to bring images into the page cache; does nothing (False) where they are there or no arena holds them."""
        if len(file) == 0:
            return False
        # Whatever is wrong with a file, the reader meets it next and says so.
        with contextlib.suppress(StackError):
            arena = self._arena_of(self.headers[int(file[0])].image_bytes)
            return arena.ask_ahead(file, image) if arena and arena.holds(file, image) else False
        return False

    def _arena_of(self, image_bytes: int) -> Arena | Literal[False]:
        """The arena for images of this size, made when it is first asked for; False if there can be none."""
        if self._process != os.getpid():
            # A fork may have left the lock behind in the hands of a thread that is no more; maps come along.
            self._deciding, self._process = threading.Lock(), os.getpid()
        arena = self._arena
        if arena is None:
            with self._deciding:
                if self._arena is None:
                    self._arena = self._make_arena(image_bytes, self.dtype)
                arena = self._arena
        return arena

    def _make_arena(self, image_bytes: int, dtype: np.dtype[Any]) -> Arena | Literal[False]:
        """An arena of the files with images of this size and dtype (byte order included), or False if there can be none."""
        fits = np.array([header.dtype == dtype and header.image_bytes == image_bytes for header in self.headers])
        starts = np.array([header.offset for header in self.headers])
        if not fits.any() or not can_map(int(fits.sum()), starts[fits], image_bytes, dtype.itemsize):
            return False
        counts = np.where(fits, self._counts, 0)
        check = None if self._check is None else self._check_number
        try:
            return Arena(self.paths, starts, counts, image_bytes=image_bytes, itemsize=dtype.itemsize, check=check)
        except NoMoreMapsError as error:
            log.info("%s Files are read one by one.", error)
            return False

    def _check_number(self, number: int) -> None:
        assert self._check is not None
        self._check(self.paths[number], self.headers[number])

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self.paths, self.headers, self._check)


def _remake(paths: Sequence[str], headers: Sequence[MrcHeader], check: Check | None) -> MrcStacks:
    return MrcStacks(paths, headers, check=check)


def images_needed(file: np.ndarray, image: np.ndarray, n_files: int) -> np.ndarray:
    """How many images each file must have, at the least, for all rows to be in it."""
    needed = np.zeros(n_files, np.int64)
    np.maximum.at(needed, file, image + 1)
    return needed


def open_stacks(paths: Sequence[str | os.PathLike[str]], *, mode0: Mode0 = "auto", needed: np.ndarray | None = None) -> MrcStacks:
    """Read the headers of all files, several at a time, and give what reads them.

    Parameters
    ----------
    paths : the files
    mode0 : see ``cryolike_data.mrc.read_header``
    needed : images that each file must have; if given, only the first header is read now, and every file is expected to be
        laid out like the first, which is checked when it is mapped

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

    if needed is not None and len(names):
        first = read_header(names[0], mode0=mode0)
        of_count = {count: replace(first, nz=count, n_complete=count) for count in set(needed.tolist())}
        alike = [of_count[count] for count in needed.tolist()]
        return MrcStacks(names, alike, check=partial(require_alike, mode0=mode0))
    # In a few portions, because handing a task to a thread takes as long as reading a header.
    portions = [names[k::_THREADS] for k in range(_THREADS)]
    results: list[Any] = [None] * len(names)
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        for k, found in enumerate(pool.map(lambda portion: [header_or_error(name) for name in portion], portions)):
            results[k::_THREADS] = found
    errors = [str(result) for result in results if isinstance(result, Exception)]
    if errors:
        raise StackError("\n".join([f"{len(errors)} of {len(names)} stacks cannot be read:", *(f"  {text}" for text in errors)]))
    return MrcStacks(names, tuple(result for result in results if isinstance(result, MrcHeader)))

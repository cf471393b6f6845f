"""Many stacks (MRC files, or shards of a Zarr store) read as one: headers known up front, files mapped when they are first needed."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from .arena import Arena, NoMoreMapsError, can_map, sample_of
from .errors import StackError
from .lookahead import nowhere
from .map_pool import MapPool
from .mrc import Check, Mode0, StackHeader, describe_shortfall, read_header, require_alike, require_mode0, require_unchanged
from .read_each import read_each

log = logging.getLogger(__name__)

#: Rows in a row of one file, on average, from which on they are looked at together.
_FEW_RUNS = 8
#: Rows of which the images that files must have are worked out at a time.
_STRETCH = 1 << 16


#: Memory for images, and how an arena sees it; None where there is none.
Target = tuple[np.ndarray, Tensor | None]


class Images(Protocol):
    """The images of a table's rows, wherever they lie. Rows are int64, none of them negative."""

    def places(self, rows: np.ndarray) -> Iterable[Tensor | None]:
        """For each of some batches of rows, (batches, size), what ``reading`` takes as its places: found out for all of them at once."""

    def target(self, out: np.ndarray) -> Any:
        """Memory for (B, H, W) images, contiguous, as ``reading`` takes it."""

    def reading(self, rows: np.ndarray, target: Any, places: Tensor | None = None) -> Callable[[], object]:
        """What copies the images of these rows into the target when called. All that can be found out before is."""

    def view(self, rows: np.ndarray) -> Tensor | None:
        """The images of these rows without a copy, for reading only; None if they do not lie one after the other in memory."""

    def in_memory(self, rows: np.ndarray) -> bool:
        """Whether a sample of the images is in the page cache, as far as is known without waiting; True if none can be asked for."""

    def ask_ahead(self, rows: np.ndarray) -> bool:
        """Start to bring images into the page cache; returns before they are there. False if there was nothing to do."""


class ImageSource(Protocol):
    """Where a data set's pixels come from."""

    dtype: np.dtype[Any]

    def locate(self, file: np.ndarray, image: np.ndarray) -> Images:
        """The images of a table whose row k is image ``image[k]`` of file ``file[k]``, all of one box."""


class Stacks:
    """A set of stacks, read through an arena where one can hold them, else through a pool of maps.

    Attributes
    ----------
    paths : the files
    headers : one per file
    dtype : the native dtype in which all of them can be read without loss
    counts : (files,) complete images in each
    headers_read : whether the header of each file was read, and not taken to be like the first

    Safe to share between threads. Pickles without its maps, which are opened again when needed.
    """

    def __init__(
        self, paths: Sequence[str], headers: Sequence[StackHeader], *, check: Check | None = None, headers_read: bool = True
    ) -> None:
        self.paths, self.headers, self.headers_read = tuple(paths), tuple(headers), headers_read
        self._check = check
        # Thousands of files may share few headers.
        identities = list(map(id, self.headers))
        self._kinds = dict(zip(identities, self.headers, strict=True))
        number = {identity: k for k, identity in enumerate(self._kinds)}
        self._kind = np.fromiter(map(number.__getitem__, identities), np.int64, len(identities))
        self._pool = MapPool(self.paths, self.headers, check=check)
        self.dtype = self._pool.dtype
        self.counts = self.of_headers(lambda header: header.n_complete)
        self._arena: Arena | Literal[False] | None = None
        self._deciding, self._process = threading.Lock(), os.getpid()

    def of_headers(self, value: Callable[[StackHeader], Any]) -> np.ndarray:
        """(files, ...) what a function says of the header of each file."""
        of_kind = np.array([value(header) for header in self._kinds.values()])
        return of_kind[self._kind] if len(of_kind) else of_kind

    def locate(self, file: np.ndarray, image: np.ndarray) -> StackImages:
        """The images of a table whose row k is image ``image[k]`` of file ``file[k]``, all of one box."""
        return StackImages(self, file, image)

    def arena_like(self, header: StackHeader) -> Arena | None:
        """The arena of the stacks with images like this one's, made when it is first asked for; None if there can be none."""
        if self._process != os.getpid():
            # A fork may have left the lock behind in the hands of a thread that is no more; maps come along.
            self._deciding, self._process = threading.Lock(), os.getpid()
        arena = self._arena
        if arena is None:
            with self._deciding:
                if self._arena is None:
                    self._arena = self._make_arena(header)
                arena = self._arena
        return arena or None

    def give_up_arena(self, error: NoMoreMapsError) -> None:
        """Read all files through the pool from now on."""
        log.info("%s Files are read one by one.", str(error))  # the error itself, kept with the record, would keep the arena mapped
        self._arena = False

    def read_from_pool(self, file: np.ndarray, image: np.ndarray, out: np.ndarray) -> None:
        """Copy image ``image[k]`` of file ``file[k]`` into ``out[k]`` (native byte order), one file after the other.

        Raises
        ------
        StackError
            if a file cannot be opened any more or has no such image
        """
        beyond = (image >= self.counts[file]) | (image < 0)
        if beyond.any():
            k = int(np.argmax(beyond))
            raise StackError(describe_shortfall(self.paths[file[k]], self.headers[file[k]], int(image[k])) + ".")
        self._pool.read_into(file, image, out)

    def _make_arena(self, header: StackHeader) -> Arena | Literal[False]:
        """An arena of the files with images of this size in ``dtype`` (byte order included), or False if there can be none."""
        dtype = self.dtype
        fits = self.of_headers(lambda other: other.dtype == dtype and (other.ny, other.nx) == (header.ny, header.nx))
        starts = self.of_headers(lambda other: other.offset)
        if not fits.any() or not can_map(int(fits.sum()), starts[fits], dtype):
            return False
        counts = np.where(fits, self.counts, 0)
        # Not a method of this object, which would keep the arena mapped until Python looks for cycles.
        check = None if self._check is None else partial(_check_number, self._check, self.paths, self.headers)
        try:
            return Arena(self.paths, starts, counts, shape=(header.ny, header.nx), dtype=dtype, check=check)
        except NoMoreMapsError as error:
            self.give_up_arena(error)
            return False

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Stacks, check=self._check, headers_read=self.headers_read), (self.paths, self.headers)


def _check_number(check: Check, paths: Sequence[str], headers: Sequence[StackHeader], number: int) -> None:
    check(paths[number], headers[number])


class StackImages:
    """The images of a table's rows in a set of stacks. Where each lies in the arena is worked out once, when one is first read."""

    def __init__(self, stacks: Stacks, file: np.ndarray, image: np.ndarray) -> None:
        self._stacks, self._file, self._image = stacks, file, image
        self._located: tuple[Arena, np.ndarray] | None = None
        self._all_located = False
        self._files = np.empty(0, np.int64)
        self._seen_until = -np.inf

    def places(self, rows: np.ndarray) -> Iterable[Tensor | None]:
        """Where the images of each of some batches, (batches, size), lie in the arena; None where it does not hold them all."""
        pieces = self._pieces(rows)
        return nowhere(rows) if pieces is None else pieces.unbind()

    def target(self, out: np.ndarray) -> Target:
        """Memory for (B, H, W) images, contiguous, in the dtype of the stacks, as ``reading`` takes it."""
        located = (self._located or self._locate()) if len(out) else None
        return out, None if located is None else located[0].numbers_of(out)

    def reading(self, rows: np.ndarray, target: Target, places: Tensor | None = None) -> Callable[[], object]:
        """What copies the images of these rows into a target for as many when called.

        Raises
        ------
        StackError
            here or when that is called, if a file cannot be opened any more, is truncated, or has shrunk (for what remains possible
            then, see ``Arena``)
        """
        out, numbers = target
        if numbers is not None:
            pieces = self._pieces(rows) if places is None else places
            arena = None if pieces is None else self._touched(rows)
            if arena is not None and pieces is not None:
                return arena.gathering(pieces, numbers)
        return partial(self._stacks.read_from_pool, self._file[rows], self._image[rows], out)

    def view(self, rows: np.ndarray) -> Tensor | None:
        """The images of these rows (at least one) where the arena has them, for reading only; None if not one after the other there.

        A file that shrinks is noticed as by ``reading``, when the view is made and not when it is used.
        """
        found = self._found(rows)
        return None if found is None or self._touched(rows) is None else found[0].view(found[1])

    def in_memory(self, rows: np.ndarray) -> bool:
        """Whether a sample of these images is in the page cache and their files are mapped; True where no arena holds them."""
        found = self._found(sample_of(rows))
        return found is None or found[0].in_memory(found[1])

    def ask_ahead(self, rows: np.ndarray) -> bool:
        """Start to bring images into the page cache; does nothing (False) where they are there or no arena holds them."""
        # Whatever is wrong with a file, the reader meets it next and says so.
        with contextlib.suppress(StackError, OSError):
            found = self._found(rows)
            return found is not None and self._touched(rows) is not None and found[0].ask_ahead(found[1])
        return False

    def _found(self, rows: np.ndarray) -> tuple[Arena, np.ndarray] | None:
        """Where the images of these rows, at least one, lie in the arena; None if it does not hold them all."""
        located = (self._located or self._locate()) if rows.size else None
        if located is None:
            return None
        arena, everywhere = located
        places = everywhere[rows]
        return None if not self._all_located and places.min() < 0 else (arena, places)

    def _pieces(self, rows: np.ndarray) -> Tensor | None:
        """The same as the arena gathers them."""
        found = self._found(rows)
        return None if found is None else found[0].pieces_of(found[1])

    def _touched(self, rows: np.ndarray) -> Arena | None:
        """The arena, in which the files of these rows are mapped and long enough; None, then and for all to come, if it can map no more."""
        located = self._located or self._locate()
        if located is not None and time.monotonic() >= self._seen_until:
            try:
                located[0].touch(self._file[rows])
            except NoMoreMapsError as error:
                self._stacks.give_up_arena(error)
                self._located = None
                return None
            self._seen_until = located[0].seen_until(self._files)
        return None if located is None else located[0]

    def _locate(self) -> tuple[Arena, np.ndarray] | None:
        arena = self._stacks.arena_like(self._stacks.headers[int(self._file[0])])
        if arena is None:
            return None
        places = arena.rows_of(self._file, self._image)
        self._files = np.flatnonzero(np.bincount(self._file))
        self._all_located = bool((places >= 0).all())
        self._located = arena, places
        return self._located


def images_needed(file: np.ndarray, image: np.ndarray, n_files: int) -> np.ndarray:
    """How many images each file must have, at the least, for all rows to be in it."""
    last = np.full(n_files, -1, image.dtype)
    for start in range(0, len(file), _STRETCH):  # new memory for what is needed on the way would take longer than the work
        of_file, in_file = file[start : start + _STRETCH], image[start : start + _STRETCH]
        starts = np.flatnonzero(np.append(True, of_file[1:] != of_file[:-1]))
        if len(starts) < len(of_file) // _FEW_RUNS:  # rows of one file lie together: one number for each run of them
            of_file, in_file = of_file[starts], np.maximum.reduceat(in_file, starts)
        np.maximum.at(last, of_file, in_file)
    return last + 1


def open_stacks(
    paths: Sequence[str | os.PathLike[str]],
    *,
    mode0: Mode0 = "auto",
    needed: np.ndarray | None = None,
    check_headers: bool = True,
    index_hint: str = "",
) -> Stacks:
    """Read the headers of all files, and give what reads them.

    Parameters
    ----------
    paths : the files
    mode0 : see ``cryolike_data.mrc.read_header``
    needed : images that each file must have; the error for a header that cannot be used then names files with fewer, too
    check_headers : False reads the first header only; every file is expected to be laid out like the first and to have the images
        that are ``needed``, which is checked when it is mapped
    index_hint : what to say after the error for a file with fewer images then

    Raises
    ------
    StackError
        listing every file whose header cannot be used
    """
    require_mode0(mode0)
    names = tuple(os.fspath(path) for path in paths)
    if needed is not None and not check_headers and len(names):
        first = read_header(names[0], mode0=mode0)
        counts = needed.tolist()
        # A header that was not read says nothing of the pixel size.
        of_count = {count: replace(first, nz=count, n_complete=count, pixel_size=None) for count in set(counts)}
        alike = [replace(of_count[counts[0]], pixel_size=first.pixel_size), *(of_count[count] for count in counts[1:])]
        return Stacks(names, alike, check=partial(require_alike, mode0=mode0, index_hint=index_hint), headers_read=False)

    def amiss(number: int, header: StackHeader) -> str:
        images = 0 if needed is None else int(needed[number])
        return describe_shortfall(names[number], header, images - 1) if header.n_complete < images else ""

    headers = read_each(names, partial(read_header, mode0=mode0), "stacks", amiss=amiss)
    return Stacks(names, headers, check=partial(require_unchanged, mode0=mode0))

"""Going through the rows of a table, in blocks that stay in the cache and on several cores."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import numpy as np

from ..errors import TableError
from ..memory import own_array
from ..repeated import is_repeated, one_value_once, repeat, take
from .numbering import Numbering, merge, records

#: Rows that are looked at together at the most: few enough to stay in the cache, and many, because threads wait for each other in between.
BLOCK_ROWS = 1 << 14
#: Bytes of such rows at the most, for tables with hundreds of fields.
_BLOCK_BYTES = 8 << 20
#: Where fewer rows than one in so many are wanted, those between them are not read.
_SPARSE = 4
#: Threads that go through a table at the most; memory is the limit before many are busy.
_MOST_THREADS = 4
_WORDS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}

ResultT = TypeVar("ResultT")


class Rows(Protocol):
    """The rows of a structured array, wherever they lie."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a row."""

    def __len__(self) -> int: ...

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[np.ndarray]:
        """These rows, so many at a time; each array is good until the next one is asked for."""


@dataclass(frozen=True)
class RowsInMemory:
    """Rows of a structured array."""

    array: np.ndarray

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a row."""
        return self.array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[np.ndarray]:
        """These rows, so many at a time."""
        return (self.array[first : min(first + rows, stop)] for first in range(start, stop, rows))


@dataclass(frozen=True)
class ColumnsInMemory:
    """Rows whose columns are apart."""

    columns: Mapping[str, np.ndarray]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a row."""
        return np.dtype([(name, column.dtype, column.shape[1:]) for name, column in self.columns.items()])

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[np.ndarray]:
        """These rows, so many at a time, put together in one buffer."""
        buffer = np.empty(min(rows, stop - start), self.dtype)
        for first in range(start, stop, rows):
            block = buffer[: stop - first]
            for name, column in self.columns.items():
                block[name] = column[first : first + len(block)]
            yield block


@dataclass(frozen=True)
class RowsOnDisk:
    """The rows of a NumPy table, which are read whenever they are needed, as long as the file is the one that was opened."""

    path: Path
    dtype: np.dtype[Any]
    start: int
    rows: int
    stamp: tuple[int, ...]

    def __len__(self) -> int:
        return self.rows

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[np.ndarray]:
        """These rows, so many at a time, in one buffer: reading them into the cache takes less than mapping their pages."""
        size = self.dtype.itemsize
        buffer = own_array((min(rows, stop - start),), self.dtype)
        with self._opened() as file:
            file.seek(self.start + start * size)
            for first in range(start, stop, rows):
                block = buffer[: stop - first]
                left = block.view(np.uint8).data
                while len(left):
                    if not (got := file.readinto(left)):
                        raise TableError(f"{self.path} has become shorter since it was opened; open the data set again.")
                    left = left[got:]  # a network file system may give less at a time
                yield block

    def load(self, fields: Collection[str], rows: np.ndarray | None) -> dict[str, np.ndarray]:
        """Columns (see ``copy_columns``) of all rows, or of these in this order."""
        if rows is None:
            return copy_columns(self, fields)[0]
        first, end = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
        if end - first > _SPARSE * len(rows):
            return copy_columns(RowsInMemory(self._map()[rows]), fields)[0]
        stretch = replace(self, start=self.start + first * self.dtype.itemsize, rows=end - first)
        columns = copy_columns(stretch, fields)[0]
        if end - first == len(rows) and (np.diff(rows) == 1).all():
            return columns
        return {name: take(column, rows - first) for name, column in columns.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.load([name], None)[name]

    def _map(self) -> np.ndarray:
        with self._opened() as file:
            return np.memmap(file, self.dtype, "r", self.start, (self.rows,)).view(np.ndarray)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[io.FileIO]:
        try:
            with self.path.open("rb", buffering=0) as file:
                if stamp_of(file) != self.stamp:
                    raise TableError(f"{self.path} has changed since it was opened; open the data set again.")
                yield file
        except OSError as error:
            raise TableError(f"{self.path} cannot be read any more: {error.strerror}.") from error


def stamp_of(file: IO[bytes]) -> tuple[int, ...]:
    """What changes with the content of a file, and is the same wherever the file is mounted."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Kinds:
    """The different rows of a few columns.

    Attributes
    ----------
    rows : (kinds,) structured array of these columns, in order of appearance
    number : (N,) int32, each row's place among them
    """

    rows: np.ndarray
    number: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """A column of all rows, in native byte order; one row repeated if all are the same."""
        of_kind = np.array(self.rows[name])
        of_kind = one_value_once(of_kind.astype(of_kind.dtype.newbyteorder("="), copy=False))
        return repeat(of_kind[:1], len(self.number)) if len(of_kind) == 1 or is_repeated(of_kind) else of_kind[self.number]

    def values(self, name: str) -> tuple[list[Any], np.ndarray]:
        """The different values of a column in order of appearance, and each row's place (int32) among them."""
        of_kind = self.rows[name].tolist()
        different = list(dict.fromkeys(of_kind))
        if len(different) == len(of_kind):
            return different, self.number
        place = {value: k for k, value in enumerate(different)}
        return different, np.array([place[value] for value in of_kind], np.int32)[self.number]


def number_rows(column: np.ndarray) -> tuple[list[Any], np.ndarray]:
    """The different values of a column of strings in order of appearance, and each row's place (int32) among them."""
    return copy_columns(ColumnsInMemory({"value": column}), (), kinds_of=("value",))[1].values("value")


def copy_columns(source: Rows, names: Collection[str], *, kinds_of: Collection[str] = ()) -> tuple[dict[str, np.ndarray], Kinds]:
    """Columns of a structured array as contiguous arrays in native byte order, in one pass over its rows.

    In the same pass the different rows of a few columns (``kinds_of``) are found, which then need not be copied row by row.
    """
    layout = _as_words(source.dtype, names)
    step = min(BLOCK_ROWS, -(-_BLOCK_BYTES // source.dtype.itemsize))
    copied = {name: own_array((len(source),), layout[name]) for name in names}
    numbers = own_array((len(source) if kinds_of else 0,), np.int32)

    def copy(start: int, stop: int) -> tuple[dict[bytes, int], np.ndarray]:
        numbering = Numbering(source.dtype, kinds_of, min(step, stop - start)) if kinds_of else None
        done = start
        for block in source.blocks(start, stop, step):
            rows = slice(done, done + len(block))
            words = block.view(layout)
            for name, column in copied.items():
                column[rows] = words[name]
            if numbering is not None:
                numbers[rows] = numbering.add(block)
            done = rows.stop
        return {} if numbering is None else numbering.known, numbers[start:stop]

    known = merge(in_row_ranges(len(source), copy))
    columns = {name: _native(column, source.dtype[name]) for name, column in copied.items()}
    return columns, Kinds(records(known, source.dtype, kinds_of), numbers)


def in_row_ranges(rows: int, work: Callable[[int, int], ResultT]) -> list[ResultT]:
    """``work(start, stop)`` for a few ranges that make up all rows, at the same time; what they return, in order."""
    n = max(1, min(_MOST_THREADS, processors(), rows // (2 * BLOCK_ROWS)))
    cuts = [rows * k // n for k in range(n + 1)]
    if n == 1:
        return [work(0, rows)]
    with ThreadPoolExecutor(n - 1) as threads:
        others = threads.map(work, cuts[1:-1], cuts[2:])
        return [work(0, cuts[1]), *others]


def processors() -> int:
    """Of the machine those that this process may use, which on a cluster may be few of many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _native(words: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    column = words.view(dtype.base).reshape(len(words), *dtype.shape)
    return column.astype(dtype.base.newbyteorder("="), copy=False)


def _as_words(row: np.dtype[Any], names: Collection[str]) -> np.dtype[Any]:
    """Of a row in which fields are plain words: NumPy copies those several times as fast as small subarrays."""
    places = [row.fields[name] for name in names] if row.fields else []
    formats = [_WORDS.get(dtype.itemsize, f"V{dtype.itemsize}") for dtype, *_ in places]
    layout: Any = {"names": list(names), "formats": formats, "offsets": [place[1] for place in places], "itemsize": row.itemsize}
    words: np.dtype[Any] = np.dtype(layout)
    return words

"""Going through the rows of a table, in blocks that stay in the cache and on several cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..memory import own_array
from .numbering import Numbering, merge

#: Rows that are copied at a time: few enough to stay in the cache, and many, because threads wait for each other between copies.
BLOCK_ROWS = 1 << 14
#: Threads that go through a table at the most; memory is the limit before many are busy.
_MOST_THREADS = 4
_WORDS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}
_WHOLE = "*whole*"

ResultT = TypeVar("ResultT")
Numbered = tuple[list[Any], np.ndarray]


def number_rows(column: np.ndarray) -> Numbered:
    """The different values of a column of strings in order of appearance, and each row's place (int32) among them."""
    name = "value"
    rows = column.view(np.dtype([(name, column.dtype)])) if len(column) else np.empty(0, [(name, "S1")])
    return copy_columns(rows, {}, numbered=name)[1]


def copy_columns(
    source: np.ndarray, fields: Mapping[str, np.dtype[Any]], *, numbered: str | None = None, own_memory: bool = False
) -> tuple[dict[str, np.ndarray], Numbered]:
    """Columns of a structured array as contiguous arrays in native byte order, in one pass over its rows.

    In the same pass one column of strings may be numbered: its different values in order of appearance, and each row's place
    (int32) among them. Columns that soon go again are better put into memory of their own (see ``own_array``), which takes longer.
    """
    new = own_array if own_memory else np.empty
    copied = {name: new((len(source),), _word(dtype)) for name, dtype in fields.items()}
    numbers = np.empty(len(source) if numbered else 0, np.int32)
    runs = _runs(source.dtype, fields, numbered)

    def copy(start: int, stop: int) -> tuple[dict[Any, int], np.ndarray]:
        # In front of each block there is room for the last row of the one before.
        buffers = [np.zeros(1 + min(BLOCK_ROWS, stop - start), run.dtype) for run in runs]
        numbering = next((run.numbering(buffer) for run, buffer in zip(runs, buffers, strict=True) if run.numbered), None)
        for rows in _blocks(start, stop):
            for run, buffer in zip(runs, buffers, strict=True):
                part = buffer[1 : 1 + rows.stop - rows.start]
                part[_WHOLE] = run.whole(source[rows])
                for name in run.names:
                    copied[name][rows] = part[name]
            if numbering is not None:
                numbers[rows] = numbering.add(source[numbered][rows])
        return {} if numbering is None else numbering.known, numbers[start:stop]

    parts = in_row_ranges(len(source), copy)
    columns: dict[str, np.ndarray] = {}
    for name, dtype in fields.items():
        column = copied[name].view(dtype.base).reshape(len(source), *dtype.shape)
        columns[name] = column.astype(dtype.base.newbyteorder("="), copy=False)
    return columns, (merge(parts), numbers)


def in_row_ranges(rows: int, work: Callable[[int, int], ResultT]) -> list[ResultT]:
    """``work(start, stop)`` for a few ranges that make up all rows, at the same time; what they return, in order."""
    n = max(1, min(_MOST_THREADS, os.cpu_count() or 1, rows // (2 * BLOCK_ROWS)))
    cuts = [rows * k // n for k in range(n + 1)]
    if n == 1:
        return [work(0, rows)]
    with ThreadPoolExecutor(n - 1) as threads:
        others = threads.map(work, cuts[1:-1], cuts[2:])
        return [work(0, cuts[1]), *others]


@dataclass(frozen=True)
class _Run:
    """Fields that lie side by side in a row, copied together: a row is wide, and each field by itself costs as much as all of them.

    Attributes
    ----------
    names : those of the fields that are to be copied out
    numbered : a field of strings that is to be numbered, or None
    layout : of a row of the source, with the run as one word
    dtype : of a row of the buffer, in which the strings start at a multiple of 8 bytes
    """

    names: list[str]
    numbered: str | None
    layout: np.dtype[Any]
    dtype: np.dtype[Any]

    def whole(self, source: np.ndarray) -> np.ndarray:
        whole: np.ndarray = source.view(self.layout)[_WHOLE]
        return whole

    def numbering(self, buffer: np.ndarray) -> Numbering:
        assert self.numbered is not None
        assert self.dtype.fields is not None
        dtype, start = self.dtype.fields[self.numbered][:2]
        words = buffer.view(np.uint64).reshape(len(buffer), -1)
        return Numbering(dtype.itemsize, words, start // 8)


def _runs(row: np.dtype[Any], fields: Mapping[str, np.dtype[Any]], numbered: str | None) -> list[_Run]:
    names = [*fields, *([] if numbered is None or numbered in fields else [numbered])]
    place = {name: row.fields[name][:2] for name in names} if row.fields else {}
    groups: list[list[str]] = []
    end = -1
    for name in sorted(names, key=lambda name: place[name][1]):
        dtype, offset = place[name]
        groups[-1:] = [[*groups[-1], name]] if offset == end else [*groups[-1:], [name]]
        end = offset + dtype.itemsize
    return [_run([(name, *place[name]) for name in group], row.itemsize, fields, numbered) for group in groups]


def _run(group: list[tuple[str, np.dtype[Any], int]], row_bytes: int, fields: Mapping[str, np.dtype[Any]], numbered: str | None) -> _Run:
    first, size = group[0][2], sum(dtype.itemsize for _, dtype, _ in group)
    shift = -next((offset - first for name, _, offset in group if name == numbered), 0) % 8
    layout: Any = {"names": [_WHOLE], "formats": [f"V{size}"], "offsets": [first], "itemsize": row_bytes}
    buffer: Any = {
        "names": [_WHOLE, *(name for name, _, _ in group)],
        "formats": [f"V{size}", *(_word(dtype) for _, dtype, _ in group)],
        "offsets": [shift, *(shift + offset - first for _, _, offset in group)],
        "itemsize": max(1, -(-(shift + size) // 64)) * 64,
    }
    in_it = [name for name, _, _ in group]
    return _Run([n for n in in_it if n in fields], numbered if numbered in in_it else None, np.dtype(layout), np.dtype(buffer))


def _word(dtype: np.dtype[Any]) -> str:
    """A plain word of the same size: NumPy copies those several times as fast as small subarrays."""
    return _WORDS.get(dtype.itemsize, f"V{dtype.itemsize}")


def _blocks(start: int, stop: int) -> Iterator[slice]:
    return (slice(first, min(first + BLOCK_ROWS, stop)) for first in range(start, stop, BLOCK_ROWS))

"""Columns that hold one value in all rows: kept, looked at and sent elsewhere as one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


def repeat(row: np.ndarray, rows: int) -> np.ndarray:
    """A column of so many rows (for reading only) that all are this one, (1, ...), without memory for more than that."""
    return np.broadcast_to(row, (rows, *row.shape[1:]))


def is_repeated(column: Any) -> bool:
    """Whether a column is one value, seen once for each row."""
    return isinstance(column, np.ndarray) and len(column) > 1 and column.strides[0] == 0


def once(column: np.ndarray) -> np.ndarray:
    """The rows of a column that are worth a look: one where all are the same memory."""
    return column[:1] if is_repeated(column) else column


def take(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The chosen rows (numbers) of a column."""
    return repeat(column[:1], len(rows)) if is_repeated(column) else column[rows]


def one_value_once(column: np.ndarray) -> np.ndarray:
    """The column, in the memory of one row where all rows hold the same, as they do of most optics."""
    if is_repeated(column) or not len(column) or not (column == column[0]).all():
        return column
    return repeat(column[:1].copy(), len(column))


@dataclass(frozen=True)
class Repeated:
    """A column of one value, as it travels between processes."""

    row: np.ndarray
    rows: int

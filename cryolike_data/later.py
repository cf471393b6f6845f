"""``Later``: columns of particles that are read when they are first asked for."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .compiled import not_compiled
from .ctf import Ctf
from .errors import CryolikeDataError
from .memory import alive
from .repeated import take

log = logging.getLogger(__name__)


class Later:
    """Columns that are read, all of them together, when the first of them is asked for; they cannot be written to.

    Parameters
    ----------
    read : gives the columns by name, of these rows (None for all)
    rows : which rows to read; None for all
    by_rows : whether some rows are read in less time than all
    """

    def __init__(
        self, read: Callable[[np.ndarray | None], dict[str, Any]], rows: np.ndarray | None = None, *, by_rows: bool = False
    ) -> None:
        self._read, self._rows, self.by_rows = read, rows, by_rows
        self._columns: dict[str, Any] | None = None
        _ALL.add(self)

    def __getitem__(self, name: str) -> Any:
        if self._columns is None:
            self._columns = _for_reading(not_compiled(self._read)(self._rows))  # torch knows nothing of NumPy's records
        return self._columns.get(name)

    def take(self, rows: np.ndarray) -> Later:
        """The same columns of some rows, read only when they are asked for themselves."""
        taken = Later(self._read, rows if self._rows is None else self._rows[rows], by_rows=self.by_rows)
        if self._columns is not None:
            taken._columns = _for_reading({name: take_rows_of(column, rows) for name, column in self._columns.items()})
        return taken

    def apart(self) -> Later:
        """The same columns, read once more when they are asked for, unless they were read already."""
        return Later(self._read, self._rows, by_rows=self.by_rows) if self._columns is None else self

    def __reduce__(self) -> tuple[Callable[..., Later], tuple[Any, ...]]:
        return partial(Later, by_rows=self.by_rows), (self._read, self._rows)


def _for_reading(columns: dict[str, Any]) -> dict[str, Any]:
    """The same columns, none of which can be written to: other processes read them again, and would know nothing of it."""
    for column in columns.values():
        for values in [values for _, values in column.items()] if isinstance(column, Ctf) else [column]:
            if values is not None:
                values.flags.writeable = False
    return columns


_ALL: weakref.WeakSet[Later] = weakref.WeakSet()


def _read_all() -> None:
    """Read what is still to be read before a fork: every worker process would otherwise read it again and keep it for itself."""
    for later in alive(_ALL):
        try:
            later["uid"]
        except CryolikeDataError as error:  # whoever asks for them is told so again
            log.warning("Columns that are not read yet cannot be shared with a forked process: %s", error)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_read_all)


def take_rows_of(value: Any, rows: np.ndarray | None) -> Any:
    """The rows (None for all) of a column or of all optics; what is None stays None."""
    if value is None or rows is None:
        return value
    return value.map(lambda column: take(column, rows)) if isinstance(value, Ctf) else take(value, rows)

"""Choosing particles on the way out: conditions on columns as text, one half set, every so many, a number of them, a random order."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from .arguments import SAME, integer
from .errors import ArgumentError
from .order import mix, permute
from .particles import Particles

Half = Literal["A", "B"]

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "=": operator.eq,
    "!=": operator.ne,
}
_CONDITION = re.compile(r"\s*([\w/.]+)\s*(?:\[\s*(\d+)\s*\])?\s*(<=|>=|==|!=|<|>|=)\s*(.*?)\s*")

#: Between conditions: "and", not inside quotation marks.
_AND = re.compile(r"""\sand\s(?=(?:[^'"]|'[^']*'|"[^"]*")*$)""")


def choose(
    particles: Particles,
    *,
    column: Callable[[str], np.ndarray],
    where: Sequence[str] = (),
    half: Half | None = None,
    every: int | None = None,
    limit: int | None = None,
    shuffle: int | None = None,
) -> np.ndarray:
    """The rows of some of the particles: all that fulfil the conditions, of these every so many, shuffled, and the first of them.

    Parameters
    ----------
    particles : among which to choose
    column : gives a column with a value for each particle by its name, or raises
    where : conditions, all of which have to hold: ``"ctf/df1_A < 20000"``, ``"alignments3D/shift[0] >= -3 and alignments3D/class == 1"``
    half : one half set, A (0 in the table) or B (1)
    every : one of so many
    limit : at the most so many
    shuffle : seed of a random order

    Raises
    ------
    ArgumentError
        if a condition cannot be understood, a column is not known, or nothing is left
    """
    for name, number in (("every", every), ("limit", limit)):
        if number is not None:
            integer(name, number, least=1)
    kept = np.ones(len(particles), bool)
    for condition in (part for text in where for part in _AND.split(text)):
        kept &= _holds(condition, column)
    if half is not None:
        if particles.half_set is None:
            raise ArgumentError("The particles have no half sets (alignments3D/split) to choose by.")
        kept &= particles.half_set == ("A", "B").index(half)
    rows = np.flatnonzero(kept)[:: every or 1]
    if shuffle is not None:
        rows = rows[permute(np.arange(len(rows)), len(rows), mix(shuffle))]
    rows = rows[:limit]
    if len(rows) == 0:
        told = f": {' and '.join(where)}" if where else ""
        raise ArgumentError(f"None of the {len(particles)} particles is left by this selection{told}.")
    return rows


def _holds(condition: str, column: Callable[[str], np.ndarray]) -> np.ndarray:
    """Mask of the particles for which a condition holds."""
    match = _CONDITION.fullmatch(condition)
    if match is None:
        raise ArgumentError(f"{condition!r} is no condition; write a column, a comparison and a value, such as 'ctf/df1_A < 20000'.")
    name, position, sign, text = match.groups()
    values = column(name)
    if values.ndim > 2:
        raise ArgumentError(f"{name} has {values.shape[1:]} values a particle, which cannot be compared with one number.")
    if values.ndim == 2:
        if position is None or int(position) >= values.shape[1]:
            raise ArgumentError(f"{name} has {values.shape[1]} values a particle; choose one, {name}[0] to {name}[{values.shape[1] - 1}].")
        values = values[:, int(position)]
    elif position is not None:
        raise ArgumentError(f"{name} has one value a particle; leave out [{position}].")
    if values.dtype.kind in "SU":
        if sign not in ("==", "=", "!="):
            raise ArgumentError(f"{name} holds text, which can be compared by == and != only.")
        wanted: Any = text.strip("'\"")
        return np.asarray(_COMPARE[sign](values, wanted.encode() if values.dtype.kind == "S" else wanted))
    try:
        number: Any = int(text) if values.dtype.kind in "iu" and re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError as error:
        raise ArgumentError(f"{name} holds numbers, and {text!r} is none.") from error
    if values.dtype.kind == "f" and sign in ("==", "=", "!="):
        # float32 1.3 is not the number 1.3.
        close: np.ndarray = np.isclose(values, number, rtol=SAME)
        return ~close if sign == "!=" else close
    return np.asarray(_COMPARE[sign](values, number))

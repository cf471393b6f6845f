"""Arguments as callers give them, in the form in which they are used; what is none is an ``ArgumentError`` that names it."""

from __future__ import annotations

import operator
from typing import SupportsIndex

from .errors import ArgumentError


def integer(name: str, value: SupportsIndex) -> int:
    """An integer of Python; those of NumPy overflow, and go into no JSON."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise ArgumentError(f"{name} is a whole number, not {value!r}") from error

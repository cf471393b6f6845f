"""Arguments as callers give them, in the form in which they are used; what is none is an ``ArgumentError`` that names it."""

from __future__ import annotations

import operator
from typing import Any, SupportsIndex

import numpy as np
import torch

from .errors import ArgumentError

#: By how much numbers that are the same may differ, as a share of one: rounding in single precision, and the digits that people type.
SAME = 1e-5


def integer(name: str, value: SupportsIndex, *, least: int | None = None) -> int:
    """An integer of Python, no smaller than ``least``; those of NumPy overflow, and go into no JSON."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ArgumentError(f"{name} is a whole number, not {value!r}") from error
    if least is not None and number < least:
        raise ArgumentError(f"{name} is at least {least}, not {number}")
    return number


def device_of(device: torch.device | str) -> torch.device:
    """A device by its name."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device={device!r} is not a device of torch, such as cpu or cuda: {error}") from error


def device_here(device: torch.device | str) -> torch.device:
    """The same; a GPU only where there is one."""
    place = device_of(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device={str(place)!r} needs a GPU, and torch.cuda.is_available() is False here")
    return place


def square_pixel_size(value: Any) -> float:
    """One number for a pixel size given as a number or as an (x, y) pair."""
    try:
        sizes = np.atleast_1d(np.asarray(value, float))
    except (TypeError, ValueError):
        sizes = np.empty(0)
    if (
        sizes.ndim != 1
        or len(sizes) not in (1, 2)
        or not (np.isfinite(sizes) & (sizes > 0)).all()
        or not np.allclose(sizes, sizes[0], rtol=SAME)
    ):
        raise ArgumentError(f"pixel_size is a positive number of angstrom (or two equal ones), not {value!r}")
    return float(sizes[0])

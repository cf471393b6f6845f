"""Arguments as callers give them, in the form in which they are used; what is none is an ``ArgumentError`` that names it."""

from __future__ import annotations

import operator
from typing import SupportsIndex

import torch

from .errors import ArgumentError


def integer(name: str, value: SupportsIndex) -> int:
    """An integer of Python; those of NumPy overflow, and go into no JSON."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise ArgumentError(f"{name} is a whole number, not {value!r}") from error


def device_of(device: torch.device | str) -> torch.device:
    """A device by its name."""
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"device={device!r} is not a device of torch, such as cpu or cuda: {error}") from error


def device_here(device: torch.device | str) -> torch.device:
    """The same; a GPU only where there is one."""
    place = device_of(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device={str(place)!r} needs a GPU, and torch.cuda.is_available() is False here")
    return place

"""Opening a large table beside ``numpy.load`` of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from cryolike_data import IndexedDataset

from .data import Project
from .measure import Figure, Settings, in_turn, seconds_of

BOUND = 1.0


def opening(settings: Settings) -> Iterator[Figure]:
    """Time to open / time of ``numpy.load``, with and without a look at every header."""
    can_leave_out = "check_headers" in inspect.signature(IndexedDataset).parameters
    for shuffled in (False, True):
        project = Project(settings.count(1_000_000), settings.count(10_000), sparse=True, shuffled=shuffled)
        table = project.make(settings.data)
        actions: list[Callable[[], object]] = [partial(np.load, table), partial(IndexedDataset, table)]
        if can_leave_out:
            actions.append(partial(IndexedDataset, table, check_headers=False))
        seconds = in_turn([partial(seconds_of, action) for action in actions], 5)
        case = f"{project.images:,} rows, {project.stacks:,} stacks, {'shuffled' if shuffled else 'in order'}"
        floor, checked = (f"{value:.3f} s" for value in seconds.middle[:2])
        if can_leave_out:
            yield Figure("open", case, floor, f"{seconds.middle[2]:.3f} s", seconds.ratio(2, 0), ("at most", BOUND), seconds.note)
            yield Figure("open", f"{case}, headers", floor, checked, seconds.ratio(1, 0))
        else:
            note = "headers read: check_headers is not there yet"
            yield Figure("open", case, floor, checked, seconds.ratio(1, 0), ("at most", BOUND), note)

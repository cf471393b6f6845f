"""Opening a large table beside ``numpy.load`` of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from cryolike_data import IndexedDataset

from .data import Project
from .measure import Figure, Settings, in_turn, seconds_of
from .page_cache import read_through

BOUND = 1.0


def opening(settings: Settings) -> Iterator[Figure]:
    """Time to open / time of ``numpy.load``; for information, with all columns, with all headers, and of the system alone."""
    for shuffled in (False, True):
        project = Project(settings.count(1_000_000), settings.count(10_000), sparse=True, shuffled=shuffled)
        table = project.make(settings.data)
        actions: list[Callable[[], object]] = [
            partial(np.load, table),
            partial(IndexedDataset, table, check_headers=False),
            partial(_with_columns, table),
            partial(IndexedDataset, table),
            partial(_read_and_list, table, project.paths(settings.data)[0].parent),
        ]
        seconds = in_turn([partial(seconds_of, action) for action in actions])
        floor, *ours = (f"{value:.3f} s" for value in seconds.middle)
        case = f"{project.images:,} rows, {project.stacks:,} stacks, {'shuffled' if shuffled else 'in order'}"
        yield Figure("open", case, floor, ours[0], seconds.ratio(1, 0), ("at most", BOUND), seconds.note)
        yield Figure("open", f"{case}, all columns", floor, ours[1], seconds.ratio(2, 0))
        yield Figure("open", f"{case}, headers", floor, ours[2], seconds.ratio(3, 0))
        yield Figure("open", f"{case}, bare read and list", floor, ours[3], seconds.ratio(4, 0))


def _with_columns(table: object) -> object:
    dataset = IndexedDataset(str(table), check_headers=False)
    return dataset, dataset.particles.columns()


def _read_and_list(table: Path, folder: Path) -> object:
    """What cannot be left out: each byte of the table seen once, and which files there are."""
    read_through([table])
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}

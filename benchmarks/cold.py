"""Cold reading: data that are on the disk and not in the page cache (of this system; what lies below it may have its own)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cryolike_data import IndexedDataset, ParticleDataset
from cryolike_data.stream import stream

from .data import Project
from .measure import Figure, Settings, gigabytes_per_second, in_turn, rate_figure
from .page_cache import forget, read_through
from .reading import drain

SPEED_BOUND, BYTES_BOUND = 0.65, 1.15
_BATCH = 256
#: Share of the pages that may be left after an eviction (the headers are read again when a data set is opened).
_LEFT = 0.01


def cold(settings: Settings) -> Iterator[Figure]:
    """Random reading through ``stream`` / a sequential read of as many bytes."""
    project, paths = _private(settings)
    # Three images of four, so that whatever is read beside them costs something.
    rows = np.sort(np.random.default_rng(3).permutation(project.images)[: project.images * 3 // 4])
    wanted = len(rows) * project.image_bytes

    def floor() -> float:
        _evict(paths)
        return gigabytes_per_second(lambda: read_through(paths, wanted))

    def ours() -> float:
        dataset = _opened_cold(project, paths, settings, rows)
        return gigabytes_per_second(lambda: drain(stream(dataset, batch_size=_BATCH, shuffle=True)))

    rates = in_turn([floor, ours])
    yield rate_figure("cold", f"{project.label}, {wanted / 1e9:.1f} GB", rates, "GB/s", bound=("at least", SPEED_BOUND))


def cold_bytes(settings: Settings) -> Iterator[Figure]:
    """Bytes that random batches through ``stream`` read from the disk / bytes asked for."""
    project, paths = _private(settings)
    batches = 20
    wanted = batches * _BATCH * project.image_bytes
    from_disk = []
    for repetition in range(5):
        rows = np.random.default_rng([4, repetition]).permutation(project.images)[: batches * _BATCH]
        dataset = _opened_cold(project, paths, settings, rows)
        before = _read_bytes()
        drain(stream(dataset, batch_size=_BATCH, shuffle=True))
        from_disk.append(_read_bytes() - before)
        del dataset
    read = float(np.median(from_disk))
    case = f"{project.label}, {batches} batches, bytes"
    if read == 0:
        yield Figure("cold bytes", case, note="the data are not on a disk")
        return
    yield Figure("cold bytes", case, f"{wanted / 1e6:.0f} MB", f"{read / 1e6:.0f} MB", read / wanted, ("at most", BYTES_BOUND))


def _private(settings: Settings) -> tuple[Project, list[Path]]:
    project = Project(settings.count(32_000), 20, private="cold")
    project.make(settings.data)
    return project, project.paths(settings.data)


def _opened_cold(project: Project, paths: list[Path], settings: Settings, rows: np.ndarray) -> ParticleDataset:
    """A new data set (an old one keeps its pages mapped, and mapped pages stay) of which nothing is in memory."""
    gc.collect()
    dataset = IndexedDataset(project.table(settings.data)).select(rows)
    _evict(paths)
    return dataset


def _evict(paths: list[Path]) -> None:
    """Have the system forget files, and see that it did."""
    if (left := forget(paths)) > _LEFT:
        raise RuntimeError(f"{left:.1%} of the files are still in memory: the cold figures would be wrong (does anything map {paths[0]}?)")


def _read_bytes() -> int:
    """Bytes that this process has had the disk read."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])

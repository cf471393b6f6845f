"""``stream`` beside what users write today, and what it leaves of the speed of a consumer that needs the interpreter."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from multiprocessing.synchronize import Event
from pathlib import Path

import mrcfile
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cryolike_data import IndexedDataset
from cryolike_data.stream import stream

from .data import Project
from .measure import ROUNDS, Bound, Figure, Settings, in_turn, per_second, rate_figure
from .reading import bare_copy, drain

NAIVE_BOUNDS = {0: 2.5, 2: 8.0}
CONSUMER_BOUND: Bound = ("at least", 0.95)
_BATCH = 256
_BUSY_SECONDS = 0.020


class NaiveDataset(Dataset[torch.Tensor]):
    """The data set that everybody writes first: one map a stack, kept open, one image at a time."""

    def __init__(self, paths: Sequence[Path], file: np.ndarray, image: np.ndarray) -> None:
        self._paths, self._file, self._image = list(paths), file, image
        self._open: dict[int, mrcfile.mrcmemmap.MrcMemmap] = {}

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, row: int) -> torch.Tensor:
        number = int(self._file[row])
        if number not in self._open:
            self._open[number] = mrcfile.mmap(self._paths[number], "r", permissive=True)
        return torch.from_numpy(np.array(self._open[number].data[self._image[row]]))


def naive(settings: Settings) -> Iterator[Figure]:
    """``stream`` / a naive data set in ``DataLoader``, images a second."""
    project = Project(settings.count(20_000), 20)
    dataset = IndexedDataset(project.make(settings.data))
    passes = 2 if settings.quick else 5
    epoch = dataset.select(np.tile(np.arange(len(dataset)), passes))
    per_stack = project.images // project.stacks
    rows = np.arange(project.images)
    images = NaiveDataset(project.paths(settings.data), rows // per_stack, rows % per_stack)
    bare = bare_copy(project, settings)
    batches = stream(epoch, batch_size=_BATCH, shuffle=True)  # serves all epochs, as the loaders and their workers do
    for workers, bound in NAIVE_BOUNDS.items():
        loader = DataLoader(images, _BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

        def floor(loader: DataLoader[torch.Tensor] = loader) -> float:
            return per_second(lambda: sum(len(batch) for batch in loader))

        def ours() -> float:
            return per_second(lambda: drain(batches) / project.image_bytes)

        rates = in_turn([floor, ours, bare])
        yield rate_figure("naive", f"{project.label}, {workers} workers", rates, "img/s", bound=("at least", bound))
        yield rate_figure("naive", f"{project.label}, {workers} workers, bare copy", rates, "img/s", ours=2)
        del loader, floor


def consumer(settings: Settings) -> Iterator[Figure]:
    """Speed of a Python-bound consumer beside ``stream`` / alone; the time inside ``next`` does not count."""
    project = Project(settings.count(20_000), 20)
    dataset = IndexedDataset(project.make(settings.data))
    batches = 20 if settings.quick else 50
    rows = np.random.default_rng(2).integers(0, len(dataset), batches * _BATCH)
    epoch = dataset.select(rows)
    steps = 10_000
    while (taken := min(_spin(steps) for _ in range(5))) < _BUSY_SECONDS:
        steps = int(steps * max(1.1, min(4.0, 1.05 * _BUSY_SECONDS / taken)))

    def alone() -> float:
        return batches / sum(_spin(steps) for _ in range(batches))

    def beside() -> float:
        return batches / sum(_spin(steps) for _ in stream(epoch, batch_size=_BATCH, shuffle=True))

    def beside_copies() -> float:
        spawn = multiprocessing.get_context("spawn")
        started, stop = spawn.Event(), spawn.Event()
        copies = spawn.Process(target=_copy_batches, args=(project, started, stop), daemon=True)
        copies.start()
        started.wait()
        rate = alone()
        stop.set()
        copies.join()
        return rate

    rates = in_turn([alone, beside, beside_copies], 3 * ROUNDS)  # the speed of Python alone drifts by more than is asked about
    case = f"{project.label}, 20 ms of Python a batch"
    yield rate_figure("consumer", case, rates, "loops/s", bound=CONSUMER_BOUND)
    yield rate_figure("consumer", f"{case}, bare copy in another process", rates, "loops/s", ours=2)


def _copy_batches(project: Project, started: Event, stop: Event) -> None:
    """Every 20 ms copy a batch of random images from an ordinary tensor on one thread; a process of its own shares no interpreter."""
    torch.set_num_threads(1)
    images = torch.ones(project.images, project.box, project.box)
    batch = torch.empty(_BATCH, project.box, project.box)
    random = torch.Generator().manual_seed(3)
    started.set()
    while not stop.wait(_BUSY_SECONDS):
        torch.index_select(images, 0, torch.randint(project.images, (_BATCH,), generator=random), out=batch)


def _spin(steps: int) -> float:
    """Seconds that a loop takes that holds the interpreter lock throughout."""
    start = time.perf_counter()
    total = 0
    for step in range(steps):
        total += step & 3
    return time.perf_counter() - start
